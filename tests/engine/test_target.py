"""A restricted instruction set must really restrict: judged by the registers in the emitted assembly."""

from __future__ import annotations

import re

import pytest

from anyflash.core.errors import InvalidCall
from anyflash.kernels.llvm import engine, target

_WIDE = """
declare <32 x float> @llvm.fma.v32f32(<32 x float>, <32 x float>, <32 x float>)
define void @f(ptr %p, ptr %q, i64 %n) {
  %x = load <32 x float>, ptr %p
  %y = call <32 x float> @llvm.fma.v32f32(<32 x float> %x, <32 x float> %x, <32 x float> %x)
  %keep = fcmp olt <32 x float> %y, %x
  %z = select <32 x i1> %keep, <32 x float> %x, <32 x float> %y
  store <32 x float> %z, ptr %p
  call void @llvm.memset.p0.i64(ptr %q, i8 0, i64 256, i1 false)
  ret void
}
"""
_REGISTERS = {
    "generic": (r"%xmm", r"%[yz]mm|%k\d"),
    "avx2": (r"%ymm", r"%zmm|%k\d|%[xy]mm(1[6-9]|2\d|3\d)"),
    "avx512": (r"%zmm", r"tmm"),
    "avx512bf16": (r"%zmm", r"tmm"),
    "amx": (r"%zmm", r"%k8"),
    "neon": (r"v\d+\.4s", r"%|z\d+\.s"),
}
_X86 = pytest.mark.skipif(
    target.get_target("generic").arch != "x86", reason="names x86 feature sets of the host"
)


@pytest.mark.parametrize("name", [n for n in _REGISTERS if n != "generic"])
def test_assembly_stays_within_the_instruction_set(name: str) -> None:
    used, forbidden = _REGISTERS[name]
    assembly = engine.emit_assembly(_WIDE, target.get_target(name))
    code = "\n".join(line for line in assembly.splitlines() if not line.strip().startswith((".", "#", "//")))
    assert re.search(used, code)
    assert not re.search(forbidden, code), re.search(forbidden, code)


@_X86
def test_generic_is_the_baseline_of_the_architecture() -> None:
    used, forbidden = _REGISTERS["generic"]
    text = "define void @f(ptr %p) {\n %x = load <8 x float>, ptr %p\n %y = fmul <8 x float> %x, %x\n"
    text += " store <8 x float> %y, ptr %p\n ret void\n}"
    assembly = engine.emit_assembly(text, target.get_target("generic"))
    assert re.search(used, assembly) and not re.search(forbidden, assembly)


@pytest.mark.parametrize("name", target.NAMES)
def test_description_of_each_target(name: str) -> None:
    this = target.get_target(name)
    assert this.name == name and hash(this) == hash(target.get_target(name))
    assert this.vector_bytes in (16, 32, 64) and this.num_registers in (16, 32)
    assert this.tiles == name.startswith("amx") and this.amx == (name == "amx")
    assert not this.bf16_dot or this.vector_bytes == 64
    assert this.key.startswith(name + "/")


def test_an_unknown_restriction_names_what_this_cpu_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLASH_CPU", "sse9")
    with pytest.raises(InvalidCall, match=r"ANYFLASH_CPU: unknown feature set 'sse9'.*generic"):
        target.host_target()
    assert "sse9" in target.target_report()["error"]


@_X86
@pytest.mark.parametrize("name", ["neon", "avx2", "amx"])
def test_an_impossible_restriction_says_why(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ANYFLASH_CPU", name)
    if name != "neon":
        monkeypatch.setattr(target, "host_features", lambda: {"sse2": True})
    target.why_not.cache_clear()
    target._host_target.cache_clear()
    try:
        with pytest.raises(InvalidCall, match=rf"'{name}' cannot run here: .*expected one of .*generic"):
            target.host_target()
    finally:
        target.why_not.cache_clear()
        target._host_target.cache_clear()


@pytest.mark.parametrize("name", [name for name in target.NAMES if target.why_not(name) is None])
def test_every_offered_target_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ANYFLASH_CPU", name)
    assert target.host_target() == target.get_target(name)
    assert target.target_report()["chosen"] == name


@_X86
def test_a_refused_amx_permission_falls_back_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    every = dict.fromkeys(target._AMX, True)
    monkeypatch.setattr(target, "host_features", lambda: every)
    monkeypatch.setattr(target, "_request_amx", lambda: "Linux refuses the tile registers (errno 1)")
    monkeypatch.delenv("ANYFLASH_CPU", raising=False)
    target.why_not.cache_clear()
    target._host_target.cache_clear()
    try:
        assert target.host_target().name == "avx512bf16"
        assert "refuses" in target.target_report()["targets"]["amx"]
    finally:
        target.why_not.cache_clear()
        target._host_target.cache_clear()


_INTRINSICS = {
    "avx512bf16": (
        "vdpbf16ps",
        """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define void @f(ptr %a, ptr %b, ptr %c) {
  %va = load <32 x bfloat>, ptr %a
  %vb = load <32 x bfloat>, ptr %b
  %vc = load <16 x float>, ptr %c
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
    <16 x float> %vc, <32 x bfloat> %va, <32 x bfloat> %vb)
  store <16 x float> %r, ptr %c
  ret void
}""",
    ),
    "amx": (
        "tdpbf16ps",
        """
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tdpbf16ps(i8 immarg, i8 immarg, i8 immarg)
define void @f(ptr %a) {
  call void @llvm.x86.tileloadd64(i8 1, ptr %a, i64 64)
  call void @llvm.x86.tdpbf16ps(i8 0, i8 1, i8 2)
  ret void
}""",
    ),
    "avx2": (
        "vcvtph2ps",
        """
define void @f(ptr %a, ptr %b) {
  %h = load <8 x half>, ptr %a
  %s = fpext <8 x half> %h to <8 x float>
  store <8 x float> %s, ptr %b
  ret void
}""",
    ),
    "neon": (
        "fcvtl",
        """
define void @f(ptr %a, ptr %b) {
  %h = load <4 x half>, ptr %a
  %s = fpext <4 x half> %h to <4 x float>
  store <4 x float> %s, ptr %b
  ret void
}""",
    ),
}


@pytest.mark.parametrize("name", _INTRINSICS)
def test_promised_instructions_are_there(name: str) -> None:
    instruction, text = _INTRINSICS[name]
    assert instruction in engine.emit_assembly(text, target.get_target(name))
