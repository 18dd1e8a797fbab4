"""The native protocol server: opcode -> core operation."""
