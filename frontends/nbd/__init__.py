"""The NBD door: volumes for QEMU, libvirt and the kernel, through nbdkit's python plugin."""
