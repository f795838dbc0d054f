"""Which kernel runs, what is said where none can, that a choice is made once, and what a call costs in Python.

The backends here are tables of fakes wherever the choice itself is the subject; results are other modules' business.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

import fusionops as fo
from fusionops import dispatch
from fusionops.binding import bind_conv
from fusionops.cpu import amx, winograd
from fusionops.device import AVX2_LAPTOP, AVX512_SERVER
from fusionops.dispatch import Backend, ReferenceConfig
from fusionops.kernel import Kernel
from fusionops.spec import FusionSpec, Merge, SourceSpec


def full(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


X = full(1, 6, 6, 4)
F = full(3, 3, 4, 5)


@dataclass
class Fake:
    """A kernel that writes a number, and counts what it is asked."""

    name: str
    writes: float
    reasons: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()
    asked: int = 0
    planned: list[FusionSpec] = field(default_factory=list)

    @property
    def kernel(self) -> Kernel:
        def unsupported(spec):
            self.asked += 1
            return self.reasons

        def plan(spec, device):
            self.planned.append(spec)
            return replace(ReferenceConfig(), scratch_bytes=100, shared_bytes=7)

        def run(spec, config, operands, out):
            out[...] = self.writes
            if operands.merged is not None:
                operands.merged[...] = -self.writes

        return Kernel(self.name, unsupported, plan, run, lambda spec, device: self.slow)


@pytest.fixture
def pretend(monkeypatch):
    """Puts fakes in the place of the kernels of the cpu backend."""

    def install(*fakes, unusable=()):
        table = Backend("cpu", tuple(fake.kernel for fake in fakes), None, unusable, lambda: 3)
        monkeypatch.setattr(dispatch, "backend", lambda name, number: table)
        dispatch.choose.cache_clear()

    yield install
    dispatch.choose.cache_clear()


# The choice


def test_first_kernel_that_can_runs(pretend):
    pretend(Fake("cpu.first", 1.0, ("too small",)), Fake("cpu.second", 2.0), Fake("cpu.third", 3.0))
    assert (fo.add_conv([X], F) == 2.0).all()


def test_a_slow_kernel_leaves_the_problem_to_a_later_one(pretend):
    pretend(Fake("cpu.first", 1.0, slow=("far too small",)), Fake("cpu.second", 2.0, ("no",)), Fake("cpu.third", 3.0))
    assert (fo.add_conv([X], F) == 3.0).all()
    assert fo.explain("add_conv", [X], F).others[0] == ("cpu.first", ("far too small",))


def test_where_all_are_slow_the_first_runs(pretend):
    pretend(Fake("cpu.first", 1.0, slow=("too small",)), Fake("cpu.second", 2.0, slow=("too large",)))
    assert (fo.add_conv([X], F) == 1.0).all()


def test_choice_is_made_once(pretend):
    first, second = Fake("cpu.first", 1.0, ("too small",)), Fake("cpu.second", 2.0)
    pretend(first, second)
    for _ in range(3):
        fo.add_conv([X, X.copy()], F)
    assert (first.asked, second.asked, len(second.planned)) == (1, 1, 1)
    fo.add_conv([X, X], F, strict=True)
    assert (first.asked, second.asked, len(second.planned)) == (2, 2, 2)


def test_nothing_is_planned_for_an_empty_result(pretend):
    fake = Fake("cpu.only", 1.0)
    pretend(fake)
    assert fo.add_conv([X[:0]], F).shape == (0, 4, 4, 5)
    assert fake.planned == []
    explained = fo.explain("add_conv", [X[:0]], F)
    assert (explained.kernel, explained.config) == ("cpu.only", None)


def test_refusals_are_listed_with_every_reason(pretend):
    pretend(Fake("cpu.one", 1.0, ("K is 5, needs 16", "layout is NHWC")), Fake("cpu.two", 2.0, ("it rains",)))
    out = np.full((1, 4, 4, 5), 7.0, np.float32)
    with pytest.raises(fo.UnsupportedError) as caught:
        fo.concat_conv([X], F, out=out)
    assert isinstance(caught.value, NotImplementedError)
    assert str(caught.value) == (
        "no cpu kernel can run concat_conv fprop float32 N1 H6 W6 C(4) K5 R3 S3\n"
        "  cpu.two: it rains\n"
        "  cpu.one: K is 5, needs 16; layout is NHWC\n"
        'hint: backend="reference" runs every valid problem, slowly'
    )
    assert (out == 7).all()


def test_unusable_backend_says_why(pretend):
    pretend(Fake("cpu.only", 1.0), unusable=("no compiler", "no memory"))
    with pytest.raises(fo.BackendError) as caught:
        fo.add_conv([X], F)
    assert str(caught.value) == (
        "the cpu backend cannot be used\n"
        "  cpu: no compiler\n"
        "  cpu: no memory\n"
        'hint: backend="reference" runs every valid problem, slowly'
    )


# Destinations


def test_result_is_new_or_out(pretend):
    pretend(Fake("cpu.only", 2.0))
    out = np.zeros((1, 4, 4, 5), np.float32)
    assert fo.add_conv([X], F, out=out) is out
    assert (out == 2).all()
    assert fo.add_conv([X], F) is not out


def test_staged_result_is_copied(pretend):
    pretend(Fake("cpu.only", 2.0))
    memory = np.zeros((3, 5), np.float32)
    assert fo.add([memory[:2], full(2, 5)], out=memory[1:]).base is memory
    np.testing.assert_array_equal(memory[:, 0], [0, 2, 2])


def test_subclass_as_out_is_returned_itself(pretend):
    pretend(Fake("cpu.only", 2.0))
    out = np.zeros((2, 3), np.float32).view(np.matrix)
    assert fo.add([full(2, 3)], out=out) is out
    assert (out == 2).all()


def test_sum_comes_along(pretend):
    pretend(Fake("cpu.only", 2.0))
    out = np.zeros((1, 4, 4, 5), np.float32)
    y, merged = fo.add_conv([X, X], F, return_sum=True, out=out)
    assert y is out
    assert (merged.shape, merged.dtype, merged.min(), merged.max()) == (X.shape, X.dtype, -2, -2)


def test_dense_result_has_the_leading_axes_of_the_sources(pretend):
    pretend(Fake("cpu.only", 2.0))
    assert fo.add_dense([full(2, 3, 4)], full(4, 5)).shape == (2, 3, 5)
    assert fo.add_dense([full(4)], full(4, 5)).shape == (5,)
    out = np.zeros((3, 2, 5), np.float32).transpose(1, 0, 2)
    assert fo.add_dense([full(2, 3, 4)], full(4, 5), out=out) is out
    assert (out == 2).all()


# Backends


def test_explicit_backend_never_falls_back(pretend):
    pretend(Fake("cpu.only", 1.0), unusable=("no device",))
    for name in dispatch.BACKENDS:
        with pytest.raises(fo.BackendError, match=f"the {name} backend cannot be used\n  {name}: no device"):
            fo.add([X, X], backend=name)


def test_backend_follows_the_arrays():
    assert fo.explain("add", [X]).backend == "cpu"
    assert fo.explain("add", [X], backend="reference").kernel == "reference"


@pytest.mark.parametrize(("name", "error"), [("cuda", ValueError), (["cpu"], TypeError), (1, TypeError)], ids=str)
def test_unknown_backend_is_refused(name, error):
    for call in (fo.add, lambda *args, **kwargs: fo.explain("add", *args, **kwargs)):
        with pytest.raises(error, match='needs None or one of "cpu", "gpu", "reference"'):
            call([X, X], backend=name)


def test_what_the_reference_alone_can_do():
    x = fo.Source(X, scale=full(4), shift=full(4), activation="relu")
    with pytest.raises(fo.UnsupportedError, match="a source has scale"):
        fo.add_conv([x], F)
    assert (fo.add_conv([x], F, backend="reference") == 2 * 3 * 3 * 4).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes_stay_narrow_and_sum_wide(dtype, backend):
    x, f, bias = X.astype(dtype), F.astype(dtype), np.full(F.shape[-1], 2.0**-6, dtype)
    result = fo.add_conv([x], f, bias, backend=backend)
    assert result.dtype == dtype
    assert (result == np.asarray(36 + 2.0**-6).astype(dtype)).all()
    many = np.full((1, 5000), 1, dtype)  # a sum in the dtype itself would end at 256 or 2048
    assert fo.concat_dense([many], np.full((5000, 3), 1, dtype), backend=backend)[0, 0] == np.asarray(5e3).astype(dtype)


def test_tiles_of_bfloat16_run_where_the_processor_has_them():
    name, without = "cpu.add_conv_fprop_direct_amx_bf16", amx.without_tiles()
    x, f = X.astype("bfloat16"), F.astype("bfloat16")
    plan = fo.explain("add_conv", [x], f)
    assert plan.kernel == name if without is None else dict(plan.others)[name] == (without,)
    strict = dict(fo.explain("add_conv", [x], f, strict=True).others)[name]
    assert strict[-1] == "strict=True forbids a sum that takes subnormal numbers for 0"


def test_precision_is_refused_where_it_does_not_exist():
    with pytest.raises(fo.UnsupportedError, match="precision is tf32"):
        fo.add_conv([X], F, precision="tf32")
    with pytest.raises(fo.UnsupportedError, match="precision is tf32"):
        fo.concat_dense([full(2, 3)], full(3, 4), precision="tf32")


ONE = full(1, 1, 4, 5)
WIDE, WIDE_F, DOT = full(1, 22, 20, 32), full(3, 3, 32, 9), full(1, 1, 1, 32)
CHOSEN = [
    ("add_f32", lambda: fo.explain(fo.add, [X, X]), "cpu.add_fprop_stream_f32"),
    ("add_f64", lambda: fo.explain(fo.add, [full(3, dtype=np.float64)]), "cpu.add_fprop_stream_f64"),
    ("add_weighted", lambda: fo.explain(fo.add, [X, X], weights=[1, full(4)]), "cpu.add_fprop_stream_f32"),
    ("add_upsampled", lambda: fo.explain(fo.add, [fo.Source(X, upsample=2)]), "cpu.add_fprop_stream_f32"),
    ("add_integers", lambda: fo.explain(fo.add, [full(3, dtype=int)]), "cpu.add_fprop_stream_any"),
    ("add_mixed", lambda: fo.explain(fo.add, [full(3), full(3, dtype=int)]), "cpu.add_fprop_stream_any"),
    ("concat", lambda: fo.explain(fo.concat, [X, X]), "cpu.concat_fprop_stream_any"),
    ("add_conv", lambda: fo.explain(fo.add_conv, [X, X], F), "cpu.add_conv_fprop_direct_f32"),
    ("concat_conv", lambda: fo.explain(fo.concat_conv, [X], F), "cpu.concat_conv_fprop_direct_f32"),
    ("winograd", lambda: fo.explain(fo.add_conv, [WIDE], WIDE_F), "cpu.add_conv_fprop_winograd_f32"),
    ("winograd_concat", lambda: fo.explain(fo.concat_conv, [WIDE], WIDE_F), "cpu.concat_conv_fprop_winograd_f32"),
    ("strict", lambda: fo.explain(fo.add_conv, [WIDE], WIDE_F, strict=True), "cpu.add_conv_fprop_direct_f32"),
    ("strided", lambda: fo.explain(fo.add_conv, [WIDE], WIDE_F, stride=2), "cpu.add_conv_fprop_direct_f32"),
    ("dilated", lambda: fo.explain(fo.add_conv, [WIDE], WIDE_F, dilation=2), "cpu.add_conv_fprop_direct_f32"),
    (
        "few_tiles",
        lambda: fo.explain(fo.add_conv, [full(1, 6, 14, 512)], full(3, 3, 512, 512)),
        "cpu.add_conv_fprop_direct_f32",
    ),
    (
        "few_tiles_of_small_filters",
        lambda: fo.explain(fo.add_conv, [WIDE[:, 16:, :14]], WIDE_F),
        "cpu.add_conv_fprop_winograd_f32",
    ),
    ("few_filters", lambda: fo.explain(fo.add_conv, [WIDE], WIDE_F[..., :4]), "cpu.add_conv_fprop_dots_f32"),
    (
        "few_filters_strict",
        lambda: fo.explain(fo.add_conv, [WIDE], WIDE_F[..., :4], strict=True),
        "cpu.add_conv_fprop_dots_f32",
    ),
    ("one_output", lambda: fo.explain(fo.add_conv, [WIDE[:, :3, :3]], WIDE_F), "cpu.add_conv_fprop_direct_f32"),
    ("few_taps", lambda: fo.explain(fo.add_conv, [DOT], WIDE_F, padding=1), "cpu.add_conv_fprop_direct_f32"),
    ("pointwise", lambda: fo.explain(fo.add_conv, [X, X], ONE), "cpu.add_conv_fprop_gemm_f32"),
    ("pointwise_same", lambda: fo.explain(fo.concat_conv, [X], ONE, padding="same"), "cpu.concat_conv_fprop_gemm_f32"),
    ("pointwise_padded", lambda: fo.explain(fo.concat_conv, [X], ONE, padding=1), "cpu.concat_conv_fprop_direct_f32"),
    ("add_dense", lambda: fo.explain(fo.add_dense, [full(2, 3)], full(3, 4)), "cpu.add_dense_fprop_gemm_f32"),
    ("concat_dense", lambda: fo.explain(fo.concat_dense, [full(3)], full(3, 4)), "cpu.concat_dense_fprop_gemm_f32"),
]


@pytest.mark.parametrize(("explain", "kernel"), [row[1:] for row in CHOSEN], ids=[row[0] for row in CHOSEN])
def test_kernel_that_runs(explain, kernel):
    assert explain().kernel == kernel


@pytest.mark.parametrize("device", [AVX512_SERVER, AVX2_LAPTOP], ids=["avx512", "avx2"])
def test_large_filters_are_transformed_for_enough_tiles(device):
    def runs(tiles: int, filters: int) -> bool:
        call = bind_conv("add_conv", [full(1, 4 * tiles + 2, 6, 512)], full(3, 3, 512, filters))
        return not winograd.slow(call.judgement.spec, device)

    assert [tiles for tiles in (1, 3, 4, 25) if runs(tiles, 512)] == [4, 25]
    assert [tiles for tiles in (1, 3, 4, 25) if runs(tiles, 256)] == [1, 3, 4, 25]


def test_remembered_choice_is_the_choice():
    for source in (X, X.astype(np.float64)):
        call = bind_conv("add_conv", [source], F.astype(source.dtype))
        kernel, _ = dispatch.choose(call.judgement.spec, "cpu", 0)
        assert kernel is dispatch.select(call.judgement.spec, "cpu", 0)


# Reports


def test_explanation_reads_as_a_report(pretend):
    pretend(Fake("cpu.one", 1.0, ("K is 5", "it rains")), Fake("cpu.two", 2.0), Fake("cpu.three", 3.0))
    explained = fo.explain("concat_conv", [X, X[:, ::-1].astype(">f4")], full(3, 3, 8, 5), full(5))
    assert str(explained) == (
        "concat_conv fprop float32 N1 H6 W6 C(4+4) K5 R3 S3\n"
        "runs on  cpu: cpu.two\n"
        "config   ReferenceConfig(scratch_bytes=100, shared_bytes=7)\n"
        "copies   sources[1]: byte order is not this machine's\n"
        "cost     365 parameters, 1.152e-05 GFLOP\n"
        f"moves    {(365 + 2 * 144 + 80) * 4 / 2**20:.6g} MiB,"
        f" materialised {(365 + 2 * 144 + 80 + 2 * 288) * 4 / 2**20:.6g} MiB\n"
        f"peak     {307 / 2**20:.6g} MiB extra, materialised {(288 * 4 + 307) / 2**20:.6g} MiB\n"
        "others   cpu.three: could run it, but stands later in the table\n"
        "         cpu.one: K is 5; it rains"
    )


def test_a_report_names_the_nearest_kernels_alone(pretend):
    pretend(Fake("cpu.one", 1.0), *(Fake(f"cpu.other{i}", 2.0, ("it rains",) * i) for i in range(7, 0, -1)))
    report = str(fo.explain("add_conv", [X], F))
    assert [f"cpu.other{i}:" in report for i in range(1, 8)] == [True] * 5 + [False] * 2
    assert report.endswith("and 2 more, none for fewer reasons")


def test_cost_counts_the_scratch_of_every_thread(pretend):
    pretend(Fake("cpu.only", 1.0))
    counted = fo.cost("add_conv", [X, X], F)
    assert counted.scratch_bytes == counted.peak_bytes == 3 * 100 + 7
    assert (counted.params, counted.flops) == (3 * 3 * 4 * 5, 2 * 16 * 5 * 36 + 144)


def test_cost_and_explain_raise_what_the_op_raises():
    for ask in (fo.cost, fo.explain):
        with pytest.raises(fo.SpecError, match="add_conv: filters take 8 channels"):
            ask("add_conv", [X], full(3, 3, 8, 5))
        with pytest.raises(fo.SpecError, match="op is 'mul', needs one of add, concat"):
            ask("mul", [X])
        with pytest.raises(fo.SpecTypeError, match="op is a function"):
            ask(lambda: 0, [X])
        with pytest.raises(fo.UnsupportedError):
            ask("add_conv", [fo.Source(X, scale=full(4))], F)


def test_explain_writes_nothing():
    out = np.full((1, 4, 4, 5), 7.0, np.float32)
    fo.explain("add_conv", [X], F, out=out)
    assert (out == 7).all()


def test_info_names_every_backend_and_the_version():
    report = fo.info()
    assert report.version == fo.__version__
    unusable = dict(report.backends)
    assert unusable == {"cpu": (), "gpu": dispatch.backend("gpu", 0).unusable, "reference": ()}
    lines = str(report).splitlines()
    assert lines[0].split() == ["fusionops", fo.__version__]
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["cpu", "usable"],
        ["gpu", "unusable:" if unusable["gpu"] else "usable"],
        ["reference", "usable"],
    ]
    assert any(line.startswith("numpy ") for line in lines)


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (-2, ValueError), (1.5, TypeError), (True, TypeError)])
def test_number_of_threads_is_judged(count, error):
    with pytest.raises(error, match=r"set_num_threads: n is"):
        fo.set_num_threads(count)


def test_number_of_threads_reaches_the_backend():
    from fusionops import cpu

    before = cpu.get_num_threads()
    try:
        fo.set_num_threads(np.int64(3))
        assert cpu.get_num_threads() == 3
    finally:
        fo.set_num_threads(before)


def test_warmup_tells_how_far_it_is(monkeypatch):
    from fusionops import cpu

    told = []
    monkeypatch.setattr(cpu, "warmup", lambda progress: progress(1, 2, "a tile"))
    fo.warmup(lambda *step: told.append(step))
    assert told == [(1, 2, "a tile")]


def test_equal_specs_are_one_choice():
    one, other = (FusionSpec(Merge.ADD, (SourceSpec((2, 3), "float32"),)) for _ in range(2))
    assert one is not other
    assert dispatch.choose(one, "cpu", 0)[1] is dispatch.choose(other, "cpu", 0)[1]
