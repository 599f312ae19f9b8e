"""Was this ever tried? `python tests/reports.py` prints public reports of silent failures, as a Markdown table.

Reports of scripts like this one, and of what such scripts stand on; what was tried here, what is right now, and the
test that holds it. A number is an issue or a pull request of that repository; `test_silence.py` checks the names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Report(NamedTuple):
    """Where it stands, what its author saw, what was tried here, what is right now, which test holds it ('': none)."""

    source: str
    seen: str
    tried: str
    now: str
    test: str


REPORTS: dict[str, list[Report]] = {
    "stages that do not belong together": [
        Report(
            "paiml/aprender#1585",
            "a vocabulary of another format made nearly all of the corpus unknown tokens, and the loss looked superb",
            "a tokenizer of the same size that was trained on other text, in export, evaluation and resume",
            "refused by its hash; validation tokens that are unknown are counted in a warning",
            "test_another_tokenizer_of_the_same_size_is_refused",
        ),
        Report(
            "NVIDIA-NeMo/RL#2519",
            "a run resumed with another data set skipped that one's first samples",
            "resume with other training shards of the same length, in another order, with another validation split",
            "refused: checkpoints carry a hash of what is checked of all shards at start",
            "test_resume_with_other_data_of_the_same_size_is_refused",
        ),
        Report(
            "karpathy/nanochat#541",
            "which shard was the validation split depended on how many had been downloaded",
            "a text of TEXT_FILES that grew between training and evaluation",
            "another corpus has another tokenizer hash, so that nothing trained on is scored as held out",
            "test_text_that_changed_is_another_corpus",
        ),
        Report(
            "huggingface/transformers#28867",
            "a batch size that was changed before a resume had no effect",
            "resume with other settings",
            "refused with both values, but for settings that change no result",
            "test_other_config_is_refused",
        ),
        Report(
            "huggingface/transformers#18070",
            "a longer schedule after a resume went on with a learning rate that had decayed to zero",
            "resume with more ITERATIONS, from a checkpoint and from weights",
            "refused with both values",
            "test_resume_exports_the_weights",
        ),
        Report(
            "pytorch/torchtitan#816",
            "a checkpoint of 4 ranks was loaded on 2, and half of the positions in the data were lost",
            "one rank's checkpoint on two ranks and back",
            "the same losses: a position is a function of the step",
            "test_a_run_under_torchrun",
        ),
    ],
    "files that merely match": [
        Report(
            "openai/parameter-golf#1738",
            "files with the bytes of each token lie beside the shards and match their pattern",
            "fineweb_val_bytes_000000.bin beside the validation shard: it was scored as text",
            "refused by name, since the script does not read such counts",
            "test_files_that_merely_match_are_no_shards",
        ),
        Report(
            "huggingface/datasets#3309",
            "files that matched two patterns were counted twice",
            "copies such as 'fineweb_val_000000 (1).bin' and fineweb_train_000000_copy.bin",
            "refused by name",
            "test_files_that_merely_match_are_no_shards",
        ),
        Report(
            "huggingface/datasets#3788",
            "a file became the validation split since its name had 'dev' in it",
            "fineweb_val_old_000000.bin, fineweb_val_000000.bak.bin",
            "refused by name",
            "test_files_that_merely_match_are_no_shards",
        ),
        Report(
            "openai/parameter-golf#1923",
            "a validation shard on a network drive held a fifth of the tokens",
            "a shard whose size does not fit its header",
            "refused; where the header fits, logs/report.py warns of a split that is not the challenge's",
            "test_input_errors",
        ),
        Report(
            "webdataset/webdataset#170",
            "a pattern that was not expanded stood for one shard, which all workers read",
            "a folder whose name has characters of patterns in it",
            "names of folders are taken literally",
            "test_folders_with_odd_names",
        ),
    ],
    "bytes that are counted wrong": [
        Report(
            "openai/parameter-golf#897",
            "without a piece for a space each space counts 3 bytes: bpb 20% too low",
            "tokenizers without that piece, with and without byte fallback",
            "refused at start, as is any that would count 'a b' as other than 3 bytes",
            "test_tokenizer_that_miscounts_spaces",
        ),
        Report(
            "openai/parameter-golf#1271",
            "byte tokens counted 3 bytes instead of 1: 0.95 instead of 1.13",
            "text of characters that fall back to bytes",
            "one byte each",
            "test_byte_counts_equal_the_text",
        ),
        Report(
            "openai/parameter-golf#1632",
            "the leading space was counted in the table and again in the evaluation",
            "texts with and without a space before the first word",
            "a text has as many bytes as it has",
            "test_tokenizers_that_count_right",
        ),
        Report(
            "google/sentencepiece#280",
            "unknown characters survive neither as text nor in length",
            "validation text with unknown tokens",
            "they count no bytes, which a warning says with their number",
            "test_unknown_tokens_are_told",
        ),
    ],
    "the same text on both sides": [
        Report(
            "openai/parameter-golf#2127",
            "the default of a preparation script made most validation documents training documents, too",
            "8 copies of one file under TEXT_FILES",
            "no stretch of 100 characters of what is held out stands in training. The challenge's own shards are not "
            "searched",
            "test_repeated_text_is_not_scored_and_trained",
        ),
        Report(
            "herniqeu/extract0#1",
            "cut into pieces before it was split, so that the model had seen the documents",
            "a copy with a paragraph more, files beside one that holds them all",
            "paragraphs that repeat are dropped before the text is cut",
            "test_repeated_text_is_not_scored_and_trained",
        ),
        Report(
            "js0nwu/webui#1",
            "thousands of validation pages in the training split",
            "copies with Windows' line ends, a folder that is reached by a link, too",
            "dropped as well",
            "test_repeated_text_is_not_scored_and_trained",
        ),
    ],
    "settings without effect": [
        Report(
            "y0ast/Glow-PyTorch#3",
            "an argument is accepted and never used",
            "29 names that other scripts of the challenge, or earlier versions of this one, read",
            "each is reported with the nearest setting",
            "test_names_of_other_scripts_are_reported",
        ),
        Report(
            "nerfstudio-project/nerfstudio#1729",
            "arguments beside a loaded config were ignored",
            "DEMO=1 beside DATA_PATH, EXPORT_FROM beside RESUME, EVAL_ARTIFACT beside EVAL_FLOAT ...",
            "refused, naming both; the environment wins over presets",
            "test_settings_that_would_be_ignored_beside_others",
        ),
        Report(
            "pytorch/pytorch#176851, #124717, #117496",
            "compiled code kept the first value of a flag or of a number",
            "COMPILE=1 with fake quantization that starts in mid-run",
            "the losses of the eager run; the learning rate is no part of the graph",
            "test_compiled_training_follows_qat_without_a_recompile",
        ),
    ],
    "schedules that cannot work": [
        Report(
            "Lightning-AI/litgpt#132",
            "a warm-up counted in other units: the set rate was never reached",
            "ITERATIONS=200 with the default warmdown, which was 2,500 steps",
            "the warmdown is a share of the run; one in steps that is longer than the run is told",
            "test_a_short_run_reaches_the_full_learning_rate",
        ),
        Report(
            "openai/parameter-golf#1681, #48",
            "the cap ended the run before warmdown, averaging and quantization had begun",
            "caps far below ITERATIONS",
            "all three go by the clock, too; quantization that cannot start is told",
            "test_wall_clock_cap",
        ),
        Report(
            "karpathy/nanochat#775",
            "progress beyond 1 made the learning rate negative",
            "steps beyond the last one, a clock beyond the cap",
            "never below 0 nor above 1",
            "test_warmdown_by_share",
        ),
        Report(
            "karpathy/nanoGPT#443",
            "the first step had a learning rate of 0",
            "runs of 3 to 25 steps",
            "the first one has the full rate, the last one a small rate that is not 0",
            "test_a_short_run_reaches_the_full_learning_rate",
        ),
    ],
    "the clock": [
        Report(
            "openai/parameter-golf#1956, #1950",
            "a run trained 601.2 s of 600; another had kept 0.5 s for a calibration that took 5.5 s",
            "slow writing, calibration, choice of weights, checkpoints and steps",
            "a run ends at or under its cap by what it has measured of each",
            "test_a_run_ends_under_its_cap",
        ),
        Report(
            "mmcdermott/MEDS_EIC_AR#132",
            "a timer without synchronization measures how fast work is handed out",
            "a clock that is read while the device works",
            "it waits for the device",
            "test_the_stamp_waits_for_the_device",
        ),
        Report(
            "KellerJordan/modded-nanogpt#19",
            "compiling in mid-run, off the clock",
            "graphs before and after the start of quantization",
            "all are captured in the warm-up; validation compiles while the clock stands still",
            "test_compiled_run",
        ),
        Report(
            "paiml/entrenar#294",
            "a resumed run read its data from the start and collapsed later",
            "runs that are killed and resumed again and again",
            "the losses of a run that was not; what it did after its last checkpoint is not on the clock",
            "test_resumed_equals_uninterrupted",
        ),
    ],
    "signals": [
        Report(
            "pytorch/pytorch#76894, OpenMOSS/MOSS#237",
            "a run under nohup died with its terminal: the launcher passes SIGHUP on",
            "SIGHUP, ignored by the caller, with and without torchrun",
            "it ends a rank of torchrun with the line that says how to go on, and nothing else; README says so",
            "test_nohup",
        ),
        Report(
            "Lightning-AI/pytorch-lightning#20825",
            "SIGTERM reached one rank, and the others waited for ever",
            "SIGTERM to a rank that waits for a rank that does not answer",
            "it ends at once, with its line",
            "test_signal_to_a_rank_that_waits",
        ),
        Report(
            "Lightning-AI/pytorch-lightning#688, RLinf/RLinf#1469",
            "a kill while writing left a checkpoint that broke the next start",
            "signals and kill -9 while files are written, damaged newest checkpoints",
            "the file before it is used; nothing half-written stays after a signal",
            "test_stopped_run_goes_on",
        ),
    ],
    "restarts and runs beside each other": [
        Report(
            "pytorch/pytorch#60910",
            "a program that cannot start is restarted again and again, and its error drowns",
            "torchrun --max-restarts=1 on the name of a run that is alive",
            "refused each time; the live run's files stay as they are",
            "test_a_run_that_is_alive",
        ),
        Report(
            "pytorch/pytorch#135712",
            "after a restart the store still gave the addresses of the ranks before",
            "a rank that is killed under torchrun --max-restarts=1",
            "the restarted ranks meet and go on",
            "test_a_run_under_torchrun",
        ),
        Report(
            "deepinv/deepinv#525, karpathy/nanoGPT#295",
            "two runs wrote into one folder",
            "two processes that resume one name at once, a name that has a log",
            "the second one is refused",
            "test_a_run_that_is_alive",
        ),
        Report(
            "mindsdb/mindshub#791",
            "after a start that failed the name could not be used again",
            "a typo in TEXT_FILES or DATA_PATH, then the corrected command",
            "it runs: no log is opened before the run can start",
            "test_the_corrected_command_runs",
        ),
    ],
}


def named_tests() -> set[str]:
    """The names of all tests in this folder."""
    sources = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    return {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.M)}


def table() -> str:
    """All reports as Markdown."""
    rows = ["| kind | source | seen there | tried here | now | test |", "|---|---|---|---|---|---|"]
    for kind, reports in REPORTS.items():
        rows += [f"| {kind} | {' | '.join(report)} |" for report in reports]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
