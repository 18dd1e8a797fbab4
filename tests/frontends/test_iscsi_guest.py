"""Volumes as disks of the kernel's own initiator, through the kernel's target, in a machine that is thrown away.

Three sheep, sheepfs, LIO and open-iscsi share the guest. The scripts print what they find, the tests judge it. Booting
and starting the cluster are a third of the time, so the story of one disk and that of two paths share a guest.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import conformance, needs
from tests.support.processes import BIN, run

GUEST_RUN = Path(__file__).resolve().parents[1] / "support" / "guest-run"
UNIT = Path(__file__).resolve().parents[2] / "packaging" / "systemd" / "sheepdog-iscsi.service"
GUEST_SECONDS = 1500  # emulated, on a loaded machine
SUITES_SECONDS = 3600  # emulated, on a loaded machine
# These tests repeat a command for 256 lengths: minutes each, where every request is emulated. One of each kind that
# reads, writes, compares or gives space back stands for those that differ in the command's length.
LOOPS = r"^ALL\.(Read|Write|WriteSame|WriteVerify|Verify)[0-9]+\.(Simple|BeyondEol|Async|Mismatch.*|Unmap.*)$"
LOOPS += r"|^ALL\.Unmap\.Simple$"
SAMPLES = (
    "ALL.Read6.Simple ALL.Read16.Simple ALL.Write10.BeyondEol ALL.Write16.Simple ALL.WriteVerify16.Simple"
    " ALL.Verify16.Simple ALL.WriteSame10.Simple ALL.Unmap.Simple ALL.WriteSame16.Unmap ALL.WriteSame16.UnmapVPD"
)
TEST_SECONDS = 60  # one test; what takes longer on the plain file is not compared
PATIENCE = 10  # times that for the volume: each request goes through sheepfs to three sheep, all emulated
MIB = 1 << 20

BEGIN = r"""
set -eu
mkdir -p /srv/n /run/m /run/lock; cd /srv/n
for i in 0 1 2; do sheep /srv/n/s$i -n -c local:/srv/n/shm -z $i -p 700$i & done; wait
for n in $(seq 300); do [ "$(dog node list -r 2>/dev/null | wc -l)" = 3 ] && break; sleep 0.3; done
dog cluster format -l >/dev/null
me=iqn.2026-01.org.example:initiator name=iqn.2026-01.org.example:v
one=initiatorsecret1 two=targetsecret0002
(umask 077; echo $one >/etc/one; echo $two >/etc/two)
lio=/sys/kernel/config/target/iscsi
mkfs="mkfs.ext4 -q -b 4096 -J size=4 -E lazy_itable_init=1,lazy_journal_init=1"
echo "InitiatorName=$me" >/etc/iscsi/initiatorname.iscsi
disk() {
    for n in $(seq 300); do
        d=$(ls -d /sys/class/iscsi_session/session*/device/target*/*/block/* 2>/dev/null | head -1)
        [ -n "$d" ] && [ -b "/dev/${d##*/}" ] && break; sleep 0.2
    done
    dev=/dev/${d##*/} queue=/sys/block/${d##*/}/queue
    # An emulated machine takes its time: no command and no connection is given up.
    echo 600 >/sys/block/${d##*/}/device/timeout
    for file in $lio/$name/tpgt_1/acls/*/attrib/dataout_timeout; do echo 60 >$file; done
}
"""

STORY = r"""
dog vdi create v 192M
mkdir -p $lio/iqn.2026-01.org.example:theirs/tpgt_1
dog iscsi export v --portal 127.0.0.1 --iqn $name --initiator $me --chap alice --secret-file /etc/one \
    --mutual bob --mutual-secret-file /etc/two --discovery carol --discovery-secret-file /etc/two
echo locked $(dog vdi lock list | grep -o 'port:700[0-9]')
ask() { iscsi-inq -i $1 "iscsi://$2127.0.0.1/$name/0" 2>&1 | grep -o 'Auth.* failure\|CONNECTED' | tail -1; }
echo right $(ask $me "alice%$one@"), wrong $(ask $me "alice%wrongsecret123@"), none $(ask $me ""), \
    stranger $(ask iqn.2026-01.org.example:stranger "alice%$one@")
echo discovery without $(iscsi-ls -i $me iscsi://127.0.0.1 2>&1 | grep -o 'Auth.* failure\|Target:[^ ]*' | tail -1), \
    with $(iscsi-ls -i $me "iscsi://carol%$two@127.0.0.1" 2>&1 | grep -o 'Auth.* failure\|Target:[^ ]*' | tail -1), \
    stranger $(iscsi-ls -i $me:x "iscsi://carol%$two@127.0.0.1" 2>&1 | grep -c Target:)
serial() { iscsi-inq -i $me -e 1 -c 128 "iscsi://alice%$one@127.0.0.1/$name/0" | grep -i serial; }
serial >/run/serial  # 128: page 0x80, it takes decimal numbers
grep -q "$(dog iscsi list --json | sed 's/.*"serial": "\([^"]*\).*/\1/')" /run/serial && echo serial kept

rm -rf /etc/iscsi/nodes /etc/iscsi/send_targets; iscsid
admin() { iscsiadm -m node -T $name -p 127.0.0.1 "$@"; }
admin -o new >/dev/null
admin -o update -n node.conn[0].timeo.noop_out_interval -v 0
set_auth() { admin -o update -n node.session.auth.$1 -v $2; }
set_auth authmethod CHAP; set_auth username alice; set_auth password $one
set_auth username_in bob; set_auth password_in wrongsecret123
admin --login >/dev/null 2>&1 || echo impostor refused
set_auth password_in $two
admin --login >/dev/null; disk
echo queue $(cat $queue/write_cache), discard $(cat $queue/discard_granularity) $(cat $queue/discard_max_bytes)

used() { dog vdi list -r v | grep -v '^s' | cut -d' ' -f5; }
flushes() { sed -n 's/^sheepdog_volume_flushes_total{.*} //p' /run/sheepdog/iscsi/*/stat/volume/v; }
$mkfs $dev; mount $dev /run/m
cp -r /usr/share/doc/bash /run/m/; sync
before=$(flushes); for i in 1 2 3 4 5; do echo $i >/run/m/f$i; sync /run/m/f$i; done
echo flushes $(($(flushes) - before))
dog vdi snapshot -s before v
dd if=/dev/urandom of=/run/m/heavy bs=1M count=16 conv=fsync 2>/dev/null & writer=$!
sleep 1; kill -9 $(pgrep -of '[s]heep /srv/n/s2 '); wait $writer; echo written
dog iscsi unexport v || echo busy
(cd /run/m; find . -type f | sort | xargs md5sum) >/run/sums
cp /run/m/heavy /run/m/more; sync; full=$(used); rm /run/m/more; sync; fstrim /run/m; echo freed $((full - $(used)))
dog vdi resize v 256M; dog iscsi apply; admin -R >/dev/null
dd if=/dev/urandom of=$dev bs=1M seek=208 count=16 oflag=direct 2>/dev/null; full=$(used)  # behind the file system
for n in 0 1 2 3; do
    sg_write_same --16 --unmap --lba=$((208 * 2048 + n * 8192)) --num=8192 --timeout=600 $dev
done
echo same freed $((full - $(used)))
dd if=$dev bs=1M skip=208 count=16 iflag=direct 2>/dev/null | cmp -n $((16 << 20)) - /dev/zero && echo zeros
resize2fs $dev >/dev/null 2>&1
echo size $(blockdev --getsize64 $dev)
umount /run/m; e2fsck -fn $dev >/dev/null 2>&1 && echo clean
mount $dev /run/m; (cd /run/m; md5sum -c --quiet /run/sums) && echo same; umount /run/m
admin --logout >/dev/null

theirs=$(find $lio/iqn.2026-01.org.example:theirs | wc -l)
ln -sf "$(command -v dog)" /usr/local/bin/dog
as_systemd() { $(sed -n "s/^$1=//p" UNIT); }
as_systemd ExecStop
echo cleared $(ls $lio | grep example), $(ls /sys/kernel/config/target/core), $(grep -c /run/sheepdog /proc/mounts)
as_systemd ExecStart | sed 's/[0-9]*/some/'; echo twice $(as_systemd ExecReload)
serial | cmp - /run/serial && echo serial same
admin --login >/dev/null; disk; mount -o ro $dev /run/m; (cd /run/m; md5sum -c --quiet /run/sums) && echo same
umount /run/m; admin --logout >/dev/null
mv /etc/two /etc/gone; dog iscsi apply || echo status $?
dog iscsi unexport v
echo left $(ls $lio | grep example), $(dog iscsi list -r | wc -l), \
    $(($(find $lio/iqn.2026-01.org.example:theirs | wc -l) - theirs)), \
    discovery $(cat $lio/discovery_auth/enforce_discovery_auth)
"""

# Two hosts of one kernel: each has a sheep, a sheepfs and a target of its own. `paths` says how they stand.
MULTIPATH = r"""
echo two paths
store=/srv/n/s2; sheep $store -n -c local:/srv/n/shm -z 2 -p 7002 &  # so that this line is not what was killed before
dog vdi delete v -s before; dog vdi delete v; wait $!
for n in $(seq 300); do [ "$(dog node list -r 2>/dev/null | wc -l)" = 3 ] && break; sleep 0.3; done
dog vdi create v 96M
offer() {
    dog iscsi export v --host $1 -p $2 --portal 127.0.0.1:$3 --iqn $name.$1 --initiator $me ${4-} >/dev/null 2>/run/said
}
offer a 7000 3260 --shared; offer b 7001 3261
offer c 7001 3262 || echo refused $(cut -d" " -f1-4 /run/said)
echo locked $(dog vdi lock list | grep -o 'port:700[0-9]([a-z]*)' | cut -c1-9)

rm -rf /etc/iscsi/nodes /etc/iscsi/send_targets
path_to() { iscsiadm -m node -T $name.$1 -p 127.0.0.1:$2 "${@:3}"; }
log_in() {
    path_to $1 $2 -o new >/dev/null
    path_to $1 $2 -o update -n node.conn[0].timeo.noop_out_interval -v 0
    path_to $1 $2 -o update -n node.session.timeo.replacement_timeout -v 5
    path_to $1 $2 --login >/dev/null
    for n in $(seq 300); do [ -b /dev/$3 ] && break; sleep 0.2; done
    echo 600 >/sys/block/$3/device/timeout
    for file in $lio/$name.$1/tpgt_1/acls/*/attrib/dataout_timeout; do echo 60 >$file; done
}
log_in a 3260 sda; log_in b 3261 sdb
cmp /sys/block/sda/device/wwid /sys/block/sdb/device/wwid && \
    cmp /sys/block/sda/device/vpd_pg80 /sys/block/sdb/device/vpd_pg80 && echo one disk
one=$(cat /sys/block/sda/dev) two=$(cat /sys/block/sdb/dev)
dmsetup --noudevsync create mp --table \
    "0 $(cat /sys/block/sda/size) multipath 0 0 2 1 round-robin 0 1 1 $one 1000 round-robin 0 1 1 $two 1000"
for n in $(seq 100); do [ -b /dev/dm-0 ] && break; sleep 0.2; done
paths() { dmsetup status mp | grep -o '8:[0-9]* [AF]' | tr '\n' ' '; }
echo paths $(paths)
$mkfs /dev/dm-0; mount /dev/dm-0 /run/m
write() {  # files with sums, each synced, until told to stop
    n=0; rm -f /run/stop; : >/run/sums.$1
    while [ ! -e /run/stop ]; do
        n=$((n + 1)); head -c 300000 /dev/urandom >/run/piece
        cp /run/piece /run/m/$1.$((n % 12)) && sync /run/m/$1.$((n % 12)) || { echo "write failed"; break; }
        sed -i "/ $1.$((n % 12))$/d" /run/sums.$1
        echo "$(md5sum </run/piece | cut -d' ' -f1)  $1.$((n % 12))" >>/run/sums.$1
        echo $n >/run/count.$1
    done
}
written() { cat /run/count.$1 2>/dev/null || echo 0; }
some() {
    before=$(written $1)
    for n in $(seq 900); do [ "$(written $1)" -ge $((before + 4)) ] && return; sleep 0.2; done
    echo "$1 does not go on"
}
write first & writer=$!
some first
kill -9 $(pgrep -of '[s]heepfs.main .* /run/sheepdog/iscsi/a'); kill -9 $(pgrep -of '[s]heep /srv/n/s0 ')
some first; dog vdi snapshot -s busy v -p 7001; some first
touch /run/stop; wait $writer; rm /run/stop
echo one way $(paths)
echo 3 >/proc/sys/vm/drop_caches; (cd /run/m; md5sum -c --quiet /run/sums.first) && echo same

store=/srv/n/s0; sheep $store -n -c local:/srv/n/shm -z 0 -p 7000  # as above
for n in $(seq 300); do [ "$(dog node list -r -p 7001 2>/dev/null | wc -l)" = 3 ] && break; sleep 0.3; done
dog iscsi apply --host a -p 7000 | sed 's/[0-9]*/healed by some/'
for n in $(seq 300); do dd if=/dev/sda of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null && break; sleep 0.3; done
dmsetup message mp 0 reinstate_path $one
write second & writer=$!
some second
echo 0 >$lio/$name.b/tpgt_1/enable
some second
touch /run/stop; wait $writer; rm /run/stop
echo other way $(paths)
umount /run/m; e2fsck -fn /dev/dm-0 >/dev/null 2>&1 && echo clean
mount /dev/dm-0 /run/m; (cd /run/m; cat /run/sums.first /run/sums.second | md5sum -c --quiet) && echo same
umount /run/m; dmsetup --noudevsync remove mp
dog vdi resize v 128M; dog iscsi apply --host a -p 7000 >/dev/null; iscsiadm -m session -R >/dev/null
echo size $(blockdev --getsize64 /dev/sda)
"""

SUITES = r"""
dog vdi create ro 4M
iscsid
(
    name=$name.ro
    dog iscsi export ro --portal 127.0.0.1 --iqn $name --initiator $me --readonly >/dev/null
    iscsiadm -m node -T $name -p 127.0.0.1 -o new >/dev/null
    iscsiadm -m node -T $name -p 127.0.0.1 --login >/dev/null; disk
    dd if=/dev/urandom of=$dev bs=4096 count=1 oflag=direct 2>/dev/null || echo read only $(cat /sys/block/${d##*/}/ro)
    iscsiadm -m node -T $name -p 127.0.0.1 --logout >/dev/null; dog iscsi unexport ro
)
dog vdi create v 64M
dog iscsi export v --portal 127.0.0.1 --iqn $name --initiator $me >/dev/null
kill -9 $(pgrep -of '[s]heepfs.main .* /run/sheepdog/iscsi')
dog iscsi apply | sed 's/[0-9]*/healed by some/'; echo twice $(dog iscsi apply)
truncate -s 64M /run/plain
python3 - <<X
import rtslib_fb as r
disk = r.FileIOStorageObject("plain", "/run/plain", 64 << 20, None, True)
for attribute, value in (("emulate_tpu", 1), ("emulate_tpws", 1), ("unmap_zeroes_data", 1)):
    disk.set_attribute(attribute, value)
group = r.TPG(r.Target(r.FabricModule("iscsi"), "$name.plain", "create"), 1, "create")
r.NetworkPortal(group, "127.0.0.1", 3260, "any"); r.LUN(group, 0, disk)
group.set_attribute("authentication", 0)
r.MappedLUN(r.NodeACL(group, "$me", "create"), 0, 0, False)
group.enable = True
X
for one in $(iscsi-test-cu --list | grep -E "^ALL\.(SELECTED)\." | grep -vE 'LOOPS') SAMPLES; do
    limit=LIMIT
    for target in $name.plain $name; do
        disk=iscsi://127.0.0.1/$target/0
        timeout -k 1 $limit iscsi-test-cu -i $me --dataloss --test=$one $disk >/run/out 2>/dev/null || true
        grep -q "Run Summary:" /run/out || break
        echo "=== $target"; cat /run/out
        limit=$((limit * PATIENCE))
    done
done
"""


def merged(outputs: list[str]) -> dict[str, str]:
    """The outcomes of several runs of libiscsi's tests."""
    return {name: outcome for output in outputs for name, outcome in conformance.outcomes(output).items()}


def in_guest(script: str, seconds: int = GUEST_SECONDS, modules: str = "") -> str:
    """The output of a script in a guest with a cluster; it must end with status 0."""
    needs.root()
    needs.program("qemu-system-x86_64", "busybox", "iscsiadm", "iscsid", "iscsi-inq", "iscsi-ls", "mkfs.ext4", "fstrim")
    if not list(Path("/boot").glob("vmlinuz-*")):
        pytest.skip("needs a kernel in /boot (packaging/install-packages test)")
    pytest.importorskip("rtslib_fb", reason="needs rtslib-fb (make setup)")
    done = run(
        [
            GUEST_RUN, "--mem", "1536M", "--timeout", str(seconds), "--hung-task", "300",
            "--modules", modules,
            "--env", f"PATH={BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "--", "/bin/bash", "-c", BEGIN + script,
        ],
        check=False,
        seconds=seconds + 30,
    )  # fmt: skip
    output = done.stdout.decode(errors="replace")
    assert done.returncode == 0, output + done.stderr.decode(errors="replace")[-6000:]
    return output


@pytest.fixture(scope="module")
def told() -> tuple[list[str], list[str]]:
    """What the two stories print."""
    needs.program("dmsetup", "sg_write_same")
    output = in_guest(STORY.replace("UNIT", str(UNIT)) + MULTIPATH, modules="dm_multipath dm_round_robin")
    one, _, two = output.partition("two paths\n")
    return one.splitlines(), two.splitlines()


@pytest.mark.timeout(GUEST_SECONDS + 60)
def test_a_disk_of_the_kernels_initiator(told: tuple[list[str], list[str]]) -> None:
    lines = told[0]

    def numbers(word: str) -> list[int]:
        return [int(part) for line in lines if line.startswith(f"{word} ") for part in line.split()[1:]]

    assert {"locked port:7000", "twice nothing to change"} <= set(lines), lines
    no = "Authentication failure"
    assert f"right CONNECTED, wrong {no}, none {no}, stranger Authorization failure" in lines
    assert f"discovery without {no}, with Target:iqn.2026-01.org.example:v, stranger 0" in lines
    assert "impostor refused" in lines, "mutual CHAP"
    assert f"queue write back, discard {4 * MIB} {512 * MIB}" in lines
    # Each fsync is a journal commit: a flush before its last block, and that block with FUA.
    assert numbers("flushes")[0] >= 10
    assert {"written", "busy", "clean", "serial kept", "serial same", "some changes", "status 1"} <= set(lines), lines
    assert numbers("freed")[0] >= 8 * MIB, "fstrim gave too few of the 16 MiB back, in whole objects"
    assert f"same freed {16 * MIB}" in lines, "WRITE SAME with UNMAP"
    assert "zeros" in lines
    assert numbers("size") == [256 * MIB]
    assert lines.count("same") == 2
    assert "cleared iqn.2026-01.org.example:theirs, alua, 0" in lines
    assert lines[-1] == "left iqn.2026-01.org.example:theirs, 0, 0, discovery 0"


@pytest.mark.timeout(GUEST_SECONDS + 60)
def test_a_disk_with_two_paths_through_two_hosts(told: tuple[list[str], list[str]]) -> None:
    """A host dies under load, later the other one: nothing is lost, and each shows what the other one has written."""
    lines = told[1]
    assert "refused v: this sheep serves" in lines, lines
    assert "locked port:7000 port:7001" in lines
    assert "one disk" in lines
    assert "paths 8:0 A 8:16 A" in lines
    assert "one way 8:0 F 8:16 A" in lines
    assert "healed by some changes" in lines
    assert "other way 8:0 A 8:16 F" in lines
    assert lines.count("same") == 2, lines
    assert {"clean", f"size {128 * MIB}"} <= set(lines), lines
    assert not any("does not go on" in line or "write failed" in line for line in lines), lines


@pytest.mark.soak
@pytest.mark.timeout(SUITES_SECONDS + 60)
def test_the_suites_of_libiscsi_find_nothing_that_a_plain_file_has_not() -> None:
    """After sheepfs has died and `apply` has replaced it."""
    needs.program("iscsi-test-cu")
    script = SUITES.replace("SELECTED", "|".join(conformance.SUITES)).replace("LIMIT", str(TEST_SECONDS))
    script = script.replace("PATIENCE", str(PATIENCE))
    output = in_guest(script.replace("LOOPS", LOOPS).replace("SAMPLES", SAMPLES), SUITES_SECONDS)
    assert {"read only 1", "healed by some changes", "twice nothing to change"} <= set(output.splitlines()), output
    parts = output.split("=== ")[1:]
    expected = merged([part for part in parts if part.partition("\n")[0].endswith(".plain")])
    found = merged([part for part in parts if not part.partition("\n")[0].endswith(".plain")])
    print(f"a plain file: {conformance.summary(expected)}\na volume: {conformance.summary(found)}")
    assert len(conformance.passed(found)) >= 40, f"too little was tested\n{output}"
    assert {"Unmap.Simple", "WriteSame16.Unmap"} <= conformance.passed(found), f"space given back\n{output}"
    assert conformance.failed(found) & set(expected) <= conformance.failed(expected), output
    assert set(expected) <= set(found), "tests that end on a plain file do not end here"
