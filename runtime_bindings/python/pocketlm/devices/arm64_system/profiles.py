"""The emulated CPUs. Each selects other kernels of the runtimes, as the phones of its generation do."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DEFAULT_PROFILE", "PROFILES", "Profile"]


@dataclass(frozen=True, slots=True)
class Profile:
    """A CPU as the emulator names it, and what Linux tells of it in /proc/cpuinfo.

    Both have to agree: a runtime that trusts the text would run instructions that the CPU hasn't. ``features`` are
    those of the auxiliary vector; ``identification`` is the register MIDR_EL1.
    """

    cpu: str
    kernels: str
    features: str
    identification: int

    @property
    def cpuinfo(self) -> str:
        """The text of /proc/cpuinfo, of one core."""
        midr = self.identification
        return (
            "processor\t: 0\n"
            "BogoMIPS\t: 100.00\n"
            f"Features\t: {self.features}\n"
            f"CPU implementer\t: {midr >> 24 & 0xFF:#04x}\n"
            "CPU architecture: 8\n"
            f"CPU variant\t: {midr >> 20 & 0xF:#x}\n"
            f"CPU part\t: {midr >> 4 & 0xFFF:#05x}\n"
            f"CPU revision\t: {midr & 0xF}\n\n"
        )


A53 = "fp asimd aes pmull sha1 sha2 crc32 cpuid"
A76 = "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
# Without SVE and SME: no phone's runtime is built for them yet, and their kernels would hide those of i8mm.
MAX = (
    "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4 "
    "asimddp sha512 asimdfhm ilrcpc flagm sb paca pacg dcpodp flagm2 frint i8mm bf16 rng bti mte"
)
# QEMU's CPU calls itself 0x000F0510, and onnxruntime 1.32 crashes on that when it is imported; a Neoverse V1 has these
# instructions.
NEOVERSE_V1 = 0x411FD401
PROFILES: Mapping[str, Profile] = {
    "cortex-a53": Profile("cortex-a53", "no dot products", A53, 0x410FD034),
    "cortex-a76": Profile("cortex-a76", "dotprod", A76, 0x414FD0B1),
    "max": Profile("max,sve=off,sme=off", "dotprod, i8mm, bf16", MAX, NEOVERSE_V1),
}
DEFAULT_PROFILE = "cortex-a76"
