"""What choosing loses: other constants, sums over batches, and ``tools/check_choices.py``."""

import subprocess
import sys

import pandas as pd
import pytest
import torch

from pagedattn.workloads import AttentionShape

pytest.importorskip("triton")

from pagedattn.attention.cuda import (
    decode,
    decode_calls,
    decode_config,
    decode_division,
    mixed,
    prefill_choice,
    prefill_estimate,
    ways,
)
from pagedattn.attention.cuda.prefill_config import Cut
from pagedattn.benchmarking import HostWork, choices
from pagedattn.benchmarking.choices import AS_IT_IS, Constants, TimedWays, grid_of
from pagedattn.testing.emulator import emulation, unavailable

from .tools import TOOLS, load_tool

TOOL = TOOLS / "check_choices.py"


def timed(name, chosen=0, *microseconds, others=()):
    """Ways that take so long, of which one is chosen; `others` are chosen by other constants."""
    shape = AttentionShape(name, (1,), (64,))
    seconds = {f"way {i}": us * 1e-6 for i, us in enumerate(microseconds)}
    labels = dict(
        zip(["prefill_estimate.UNEVEN=0", "prefill_estimate.UNEVEN=0.25"], others, strict=False)
    )
    chosen_by = {AS_IT_IS: chosen, **labels}
    return TimedWays(shape, seconds, {label: f"way {i}" for label, i in chosen_by.items()})


class TestConstants:
    def test_are_others_inside_and_the_same_after(self):
        before = prefill_estimate.UNEVEN
        with Constants((("prefill_estimate.UNEVEN", 0.125),)).applied():
            assert prefill_estimate.UNEVEN == 0.125
        assert before == prefill_estimate.UNEVEN != 0.125

    def test_are_restored_after_a_failure(self):
        before = prefill_estimate.UNEVEN
        with (
            pytest.raises(RuntimeError),
            Constants((("prefill_estimate.UNEVEN", 0.125),)).applied(),
        ):
            raise RuntimeError
        assert before == prefill_estimate.UNEVEN

    def test_are_set_wherever_they_are_imported(self):
        before = prefill_choice.MOST_SHARED_BYTES
        with Constants((("prefill_choice.MOST_SHARED_BYTES", 7),)).applied():
            assert prefill_choice.MOST_SHARED_BYTES == ways.MOST_SHARED_BYTES == 7
        assert prefill_choice.MOST_SHARED_BYTES == ways.MOST_SHARED_BYTES == before

    def test_what_others_made_is_not_kept(self):
        before = prefill_choice._ways(Cut(2, 128), 48)
        with Constants((("prefill_choice.LEAST_FILLED", 0.5),)).applied():
            assert len(prefill_choice._ways(Cut(2, 128), 48)) < len(before)
        assert prefill_choice._ways(Cut(2, 128), 48) == before

    def test_what_is_not_to_be_tried_is_there(self):
        modules = (
            *(decode_calls, decode_config, decode_division, mixed),
            *(prefill_choice, prefill_estimate),
        )
        assert {name for name in choices.FACTS if any(hasattr(each, name) for each in modules)} == (
            choices.FACTS
        )

    def test_have_a_label(self):
        values = (("prefill_estimate.UNEVEN", 0.25), ("prefill_choice.MOST_SHARED_BYTES", 8))
        assert (
            Constants(values).label
            == "prefill_estimate.UNEVEN=0.25 prefill_choice.MOST_SHARED_BYTES=8"
        )
        assert Constants().label == AS_IT_IS
        near = (("decode_division.UNREAD_BYTES", 2**26 + i) for i in (0, 1))
        assert len({Constants((each,)).label for each in near}) == 2

    def test_a_grid_has_all_combinations_and_those_of_the_code_first(self):
        grid = grid_of(["prefill_estimate.UNEVEN=0,0.25", "prefill_choice.MOST_SHARED_BYTES=4,8"])
        assert [each.label for each in grid] == [
            AS_IT_IS,
            "prefill_estimate.UNEVEN=0 prefill_choice.MOST_SHARED_BYTES=4",
            "prefill_estimate.UNEVEN=0 prefill_choice.MOST_SHARED_BYTES=8",
            "prefill_estimate.UNEVEN=0.25 prefill_choice.MOST_SHARED_BYTES=4",
            "prefill_estimate.UNEVEN=0.25 prefill_choice.MOST_SHARED_BYTES=8",
        ]
        assert isinstance(dict(grid[1].values)["prefill_choice.MOST_SHARED_BYTES"], int)
        assert grid_of([]) == [Constants()]

    @pytest.mark.parametrize(
        ("word", "sentence"),
        [
            (
                "mixed.NOTHING=1",
                "there is no constant 'mixed.NOTHING' to try; one is prefill_estimate.UNEVEN",
            ),
            ("mixed.pays=1", "there is no constant 'mixed.pays'"),
            ("mixed.FP8=1", "there is no constant 'mixed.FP8'"),
            ("os.LATE=1", "there is no constant 'os.LATE'"),
            ("=1", "there is no constant ''"),
            ("mixed.NUM_PROGRAMS=66", "there is no constant 'mixed.NUM_PROGRAMS'"),
            ("decode_config.MIN_TILE=0", "there is no constant 'decode_config.MIN_TILE'"),
            (
                "prefill_estimate.UNEVEN=0,nan",
                "'prefill_estimate.UNEVEN=0,nan' has a value that is no float, finite and 0",
            ),
            (
                "prefill_estimate.UNEVEN=-1",
                "'prefill_estimate.UNEVEN=-1' has a value that is no float, finite and 0 or more",
            ),
            (
                "prefill_estimate.UNEVEN",
                "'prefill_estimate.UNEVEN' has a value that is no float, finite and 0 or more; pre",
            ),
            (
                "prefill_estimate.UNEVEN=0,x",
                "'prefill_estimate.UNEVEN=0,x' has a value that is no float",
            ),
            (
                "prefill_choice.MOST_SHARED_BYTES=1.5",
                "a value that is no int, finite and 0 or more; pre",
            ),
        ],
    )
    def test_that_are_none_are_told(self, word, sentence):
        with pytest.raises(ValueError, match="no") as caught:
            grid_of([word])
        assert sentence in str(caught.value)


class TestLosses:
    FOUND = (
        timed("even-0-of-seed-0", 0, 10, 12, others=(0, 1)),
        timed("even-1-of-seed-0", 1, 20, 20.08, others=(1, 0)),
        timed("mixed-0-of-seed-0", 2, 50, 40, 44, others=(1, 0)),
    )

    def test_are_shares_of_the_fastest_ways_time(self):
        assert [each.loss() for each in self.FOUND] == pytest.approx([0, 0.004, 0.1])
        assert self.FOUND[2].fastest == "way 1"
        assert self.FOUND[2].loss("prefill_estimate.UNEVEN=0.25") == pytest.approx(0.25)

    def test_are_told_by_kind_and_over_all(self):
        assert choices.kind_table(self.FOUND).lines == [
            ["even", "2", "2", "0.2 %", "0.4 %"],
            ["mixed", "1", "0", "10.0 %", "10.0 %"],
            ["all", "3", "2", "3.5 %", "10.0 %"],
        ]

    def test_of_other_constants_are_told_least_first(self):
        assert choices.trial_table(self.FOUND).lines == [
            ["prefill_estimate.UNEVEN=0", "1", "0.1 %", "0.4 %"],
            [AS_IT_IS, "0", "3.5 %", "10.0 %"],
            ["prefill_estimate.UNEVEN=0.25", "3", "15.0 %", "25.0 %"],
        ]
        assert not choices.trial_table([timed("even-0", 0, 1, 2)]).lines

    def test_that_are_large_are_listed(self):
        assert choices.loss_table(self.FOUND).lines == [
            ["mixed-0-of-seed-0", "way 2", "way 1", "44.00", "40.00", "10.0 %"]
        ]

    def test_are_said_in_a_line(self):
        assert str(self.FOUND[1]) == "even-1-of-seed-0 takes 20.08 µs as chosen"
        assert str(self.FOUND[2]) == (
            "mixed-0-of-seed-0 takes 44.00 µs as chosen, 10.0 % longer than the fastest of 3 ways"
        )

    def test_a_frame_has_a_row_for_each_way(self):
        frame = choices.to_frame(self.FOUND)
        assert len(frame) == 7
        of_mixed = frame[frame.workload == "mixed-0-of-seed-0"].set_index("way")
        assert of_mixed.us.to_dict() == pytest.approx({"way 0": 50, "way 1": 40, "way 2": 44})
        assert of_mixed.is_chosen.to_dict() == {"way 0": False, "way 1": False, "way 2": True}
        assert of_mixed.chosen_by["way 1"] == "prefill_estimate.UNEVEN=0"


@pytest.mark.skipif(unavailable() is not None, reason=f"emulation: {unavailable()}")
class TestTiming:
    SHAPE = AttentionShape("even-0-of-seed-0", (1,) * 3, (90,) * 3, 8, 2, 64, dtype="float16")

    def time(self, *tried):
        with emulation(6):
            return choices.time_ways(
                self.SHAPE,
                (Constants(), *tried),
                device="cpu",
                make_timed=lambda launches: HostWork(lambda: [launch() for launch in launches]),
            )

    def test_every_way_is_timed_and_the_chosen_ones_are_among_them(self, monkeypatch):
        monkeypatch.setattr(choices, "RULE", choices.StopRule(least=1, most=1))
        finer = Constants((("decode_division.LEAST_OF_PART", 16),))
        found = self.time(finer)
        assert len(found.seconds) > 3
        assert all(seconds > 0 for seconds in found.seconds.values())
        assert set(found.chosen) == {AS_IT_IS, finer.label}
        assert set(found.chosen.values()) <= set(found.seconds)

    def test_constants_by_which_nothing_can_be_chosen_are_told(self):
        with pytest.raises(ValueError, match=r"cannot choose by decode_division.LEAST_OF_PART=0: "):
            self.time(Constants((("decode_division.LEAST_OF_PART", 0),)))

    def test_a_way_whose_result_is_wrong_is_not_timed(self, monkeypatch):
        monkeypatch.setattr(choices, "time_interleaved", lambda *_: pytest.fail("it is timed"))
        monkeypatch.setattr(decode.DecodeLaunch, "__call__", lambda _, call: call.out.zero_())
        with pytest.raises(AssertionError, match=r"decode: .*: the error .* is above the budget"):
            self.time()


@pytest.fixture(scope="module")
def tool():
    return load_tool("check_choices")


@pytest.fixture
def made_up(tool, monkeypatch):
    """Time nothing and find made-up times; the batches that were asked for."""
    asked = []

    def time_ways(shape, tried):
        asked.append(shape.name)
        labels = [each.label for each in tried]
        seconds = {"decode": 4e-5, "prefill": 5e-5}
        return TimedWays(shape, seconds, dict.fromkeys(labels, "prefill"))

    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, work, shapes):
            return [work and shape for shape in shapes]

    monkeypatch.setattr(choices, "time_ways", time_ways)
    monkeypatch.setattr(tool, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(tool, "require_kernels", lambda _: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return asked


class TestTool:
    def test_prints_tables_and_writes_a_picture_and_every_way(
        self, tool, made_up, tmp_path, capsys
    ):
        out = tmp_path / "out"
        words = ["--kinds", "even,mixed", "--batches", "2", "--seed", "3", "--out", str(out)]
        assert tool.main([*words, "--try", "prefill_estimate.UNEVEN=0,0.25"]) == 0
        printed = capsys.readouterr().out
        assert made_up == [f"{kind}-{i}-of-seed-3" for kind in ("even", "mixed") for i in (0, 1)]
        assert "4 of 4: mixed-1-of-seed-3 takes 50.00 µs as chosen, 25.0 % longer" in printed
        assert "prefill_estimate.UNEVEN=0.25" in printed
        assert "batches that lose 3 % and more" in printed
        assert printed.endswith(f"Written to {out}: choices.csv, choices.png\n")
        frame = pd.read_csv(out / "choices.csv")
        assert len(frame) == 8
        assert frame.us.tolist() == [40.0, 50.0] * 4
        assert (out / "choices.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (ValueError("of a reason"), "of a reason"),
            (AssertionError("one is wrong\nby much"), "one is wrong"),
            (KeyboardInterrupt(), "interrupted"),
        ],
        ids=["an error", "a wrong result", "an interrupt"],
    )
    def test_what_ends_it_leaves_what_was_timed(
        self, tool, made_up, monkeypatch, tmp_path, capsys, error, reason
    ):
        time_ways = choices.time_ways

        def end_at_the_second(shape, tried):
            if made_up:
                raise error
            return time_ways(shape, tried)

        monkeypatch.setattr(choices, "time_ways", end_at_the_second)
        assert tool.main(["--kinds", "even", "--out", str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        assert err == f"It ended at even-1-of-seed-0: {reason}.\n"
        assert out.endswith("choices.csv, choices.png\n")
        assert set(pd.read_csv(tmp_path / "out" / "choices.csv").workload) == {"even-0-of-seed-0"}

    def test_a_kernel_that_does_not_compile_is_told_in_one_sentence(
        self, tool, made_up, monkeypatch, tmp_path, capsys
    ):
        def fail(*_):
            raise RuntimeError("decode.cu does not compile:\nline 3")

        monkeypatch.setattr(tool.ProcessPoolExecutor, "map", fail)
        assert tool.main(["--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == "It ended at compiling: decode.cu does not compile.\n"
        assert not made_up

    def test_a_folder_that_cannot_be_used_is_told_before_anything_is_timed(
        self, tool, made_up, tmp_path, capsys
    ):
        (tmp_path / "out").write_text("a file")
        assert tool.main(["--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == f"The output folder {tmp_path / 'out'} is a file.\n"
        assert not made_up

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            (["--kinds", "even,odd"], "argument --kinds: there is no kind 'odd': they are even, "),
            (
                ["--batches", "0"],
                "argument --batches: must be a whole number of 1 or more, not '0'",
            ),
            (
                ["--batches", "many"],
                "argument --batches: must be a whole number of 1 or more, not 'many'",
            ),
            (["--seed", "-1"], "argument --seed: "),
            (
                ["--try", "prefill_estimate.UNEVENNESS=1"],
                "there is no constant 'prefill_estimate.UNEVENNESS' to try; one is pre",
            ),
            (["row"], "unrecognized arguments: row"),
        ],
    )
    def test_bad_input_is_told_in_one_sentence(
        self, tool, made_up, tmp_path, capsys, words, sentence
    ):
        assert tool.main([*words, "--out", str(tmp_path / "out")]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(sentence)
        assert err.count("\n") == 1
        assert not made_up
        assert not (tmp_path / "out").exists()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_machine_without_a_gpu_is_told_in_one_sentence(self, tmp_path):
        words = [sys.executable, str(TOOL), "--out", str(tmp_path / "out")]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr == "A launch can only be timed on a GPU, and torch sees none.\n"
        assert done.stdout == ""
        assert not (tmp_path / "out").exists()
