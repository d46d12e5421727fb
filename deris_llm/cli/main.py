"""The command line, `deris-llm`: parse, call, print. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deris_llm.cli.arguments import Parser, at_least, path
from deris_llm.cli.data import add_data_commands
from deris_llm.cli.interop import add_convert_commands
from deris_llm.common.error_file import QUIET, leave_last_words
from deris_llm.common.terminal import flush_output, is_reader_gone, print_anything
from deris_llm.common.version import __version__

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deris_llm.config import RunConfig


EXAMPLES = """\
examples:
  deris-llm config list                                   run configs that are shipped
  deris-llm plan --config deris-7b-refcoco --gpus 8       parameters, memory per GPU, steps: before you rent anything
  deris-llm data synth --out data/synth --seed 0          a small synthetic world in REFER's format
  deris-llm train --config tiny-refcoco                   fine-tune on whatever is there, GPUs or two CPU ranks
  deris-llm eval --checkpoint runs/tiny-refcoco/best      the table of all splits of the checkpoint's config
  deris-llm score pred.jsonl --data data --split refcoco/val   anybody's predictions, with eval's numbers
  deris-llm predict --checkpoint runs/tiny-refcoco --image street.jpg --phrase "the red car"

`deris-llm COMMAND --help` explains each one.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name; None reads the process's own.

    Returns:
        the exit status: 0 done, 1 a run failed, 2 the input was wrong (said without a traceback unless ``--debug``).
    """
    print_anything()
    arguments = build_parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        status = arguments.run(arguments) or 0
        flush_output()
        return status
    except (
        ValueError,
        OSError,
        MemoryError,
    ) as error:  # what a user can set right; anything else is a defect and shows its traceback
        if isinstance(error, BrokenPipeError) and is_reader_gone():  # `deris-llm config show ... | head`
            flush_output()
            return 141  # as a shell says of what SIGPIPE ended
        with contextlib.suppress(OSError):
            flush_output()
        if arguments.debug:
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        if QUIET not in os.environ:
            sys.stderr.write(f"error: {kind}{error}\n(`deris-llm --debug ...` shows where)\n")
        leave_last_words(f"error: {kind}{error}")
        return 2
    except KeyboardInterrupt:
        if QUIET not in os.environ:
            sys.stderr.write("interrupted\n")
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options; imports nothing heavy."""
    parser = Parser(
        prog="deris-llm",
        description="Referring image segmentation with a multimodal LLM: fine-tune and evaluate DeRIS.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"deris-llm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = _command(commands, "train", "fine-tune a run config under DeepSpeed, then evaluate it", run_train)
    _add_config_options(train)
    train.add_argument("--output", type=path, help="folder of the run (default runs/NAME of the config)")
    train.add_argument("--gpus", type=int, help="processes, one per GPU (default: every GPU; without one, 2 CPU ranks)")
    train.add_argument("--deepspeed", metavar="FILE", help="a DeepSpeed JSON (default ds_configs/zero2.json)")
    train.add_argument(
        "--resume", metavar="auto|never|DIR", help="auto (default): go on from the run's newest checkpoint; or from DIR"
    )
    train.add_argument("--fast-dev-run", action="store_true", help="load, 2 steps, save, reload, evaluate: one minute")
    train.add_argument(
        "--allow-other-data", action="store_true",
        help="go on from a checkpoint although its training data (data.json) is not what is read now; recorded in data.json",
    )  # fmt: skip

    evaluate = _command(commands, "eval", "evaluate a checkpoint on splits, by named protocols", run_eval)
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--checkpoint", type=path, metavar="DIR", help="a run, `best` or `checkpoint-STEP` of one, or a full one"
    )
    what.add_argument("--config", metavar="NAME|FILE", help="a run config's model before fine-tuning (step 0)")
    evaluate.add_argument(
        "--splits", nargs="+", metavar="SPLIT", help="e.g. refcoco/val (default: data.eval of the config)"
    )
    evaluate.add_argument(
        "--output",
        type=path,
        metavar="DIR",
        help="report, predictions, pictures (default runs/eval/NAME-FINGERPRINT-threshold-T)",
    )
    evaluate.add_argument(
        "--max-images", type=at_least(0), default=0, metavar="N", help="images of each split (default 0 = all)"
    )
    evaluate.add_argument(
        "--protocol",
        nargs="+",
        metavar="ID|FILE",
        help="original, deris, rela480 or YAML files (default: the config's)",
    )
    evaluate.add_argument(
        "--sweep",
        metavar="SPLIT",
        help="choose the score threshold on a val split and keep it in the checkpoint, where eval and predict find it",
    )
    evaluate.add_argument(
        "--control", action="store_true", help="also ask each image for another object than is scored"
    )
    evaluate.add_argument(
        "--gpus", type=int, help="processes, one per GPU (default: every GPU; without one, 2 CPU ranks)"
    )
    _add_override_option(evaluate)

    predict = _command(commands, "predict", "masks of what phrases mean in pictures, as files", run_predict)
    predict.add_argument(
        "--checkpoint",
        type=path,
        required=True,
        metavar="DIR",
        help="a run, `best` or `checkpoint-STEP` of one, or a full one",
    )
    predict.add_argument(
        "--image", type=path, nargs="+", action="extend", default=[], metavar="FILE|DIR",
        help="pictures; of a folder its own, those of folders in it not",
    )  # fmt: skip
    predict.add_argument(
        "--phrase", action="append", default=[], metavar="TEXT", help="asked of every picture; repeatable"
    )
    predict.add_argument(
        "--jsonl", type=path, metavar="FILE",
        help='instead: lines {"image": ..., "phrase": ...} or {"image": ..., "phrases": [...]}, pictures relative to its folder',
    )  # fmt: skip
    predict.add_argument(
        "--out", type=path, metavar="DIR", help="new folder, or that of an earlier call, which is gone on with "
        "(default runs/predict/NAME-FINGERPRINT-threshold-T)",
    )  # fmt: skip
    predict.add_argument(
        "--overlay", action=argparse.BooleanOptionalAction, default=True, help="masks drawn on the pictures, as JPEG"
    )
    predict.add_argument("--instances", action="store_true", help="also each object's mask by itself")
    predict.add_argument(
        "--exif",
        choices=("displayed", "stored"),
        default="displayed",
        help="which way up pictures, and so their masks, are taken: turned as EXIF says, as viewers do (default), or as their "
        "pixels are stored",
    )
    predict.add_argument(
        "--skip-bad", action="store_true", help="leave out and count pictures and lines that cannot be used"
    )
    _add_override_option(predict)

    report = _command(commands, "report", "one self-contained HTML page of an evaluation or a run", run_report)
    report.add_argument(
        "folder",
        type=path,
        metavar="DIR",
        help="of an evaluation (report.json), or of a run that was or was not evaluated",
    )
    report.add_argument(
        "--checkpoint",
        type=path,
        metavar="DIR",
        help="the evaluated one: looks into it at some phrases (masks by query and by round)",
    )
    report.add_argument(
        "--against",
        type=path,
        metavar="DIR",
        help="another evaluation of the same splits, set beside it phrase by phrase",
    )
    report.add_argument(
        "--data", type=path, metavar="ROOT", help="folder of the data (default: where it was evaluated)"
    )
    report.add_argument(
        "--out", type=path, metavar="FILE", help="default DIR/report.html, with --against DIR/report-against-NAME.html"
    )
    report.add_argument("--seed", type=at_least(0), default=0, help="of the cases that are shown (default 0)")

    score = _command(commands, "score", "score anybody's predictions, with the metrics and files of eval", run_score)
    score.add_argument("predictions", type=path, metavar="PRED.jsonl|FOLDER", help="lines of JSON, or PNG masks")
    score.add_argument("--data", type=path, required=True, metavar="ROOT", help="folder of images and datasets")
    score.add_argument("--split", required=True, metavar="SPLIT", help="e.g. refcoco/val")
    score.add_argument(
        "--protocol",
        nargs="+",
        default=["original"],
        metavar="ID|FILE",
        help="original (default), deris, rela480 or YAML",
    )
    score.add_argument("--phrase-field", choices=("sent", "raw"), default="sent", help="which text was asked")
    score.add_argument("--against", type=path, metavar="OTHER", help="other predictions: difference, paired test, wins")
    score.add_argument(
        "--output", type=path, metavar="DIR", help="report and pictures (default runs/score/NAME-HASH-SPLIT)"
    )
    score.add_argument("--workers", type=at_least(1), metavar="N", help="processes (default: one per core, at most 8)")

    data = _command(commands, "data", "make, check and look at data")
    add_data_commands(data.add_subparsers(metavar="WHAT", required=True))

    convert = _command(
        commands, "convert", "checkpoints and other people's weight files into folders; runs nothing of them"
    )
    add_convert_commands(convert.add_subparsers(metavar="WHAT", required=True))

    plan = _command(commands, "plan", "parameters, memory per GPU, steps and tokens of a run, before it runs", run_plan)
    _add_config_options(plan)
    plan.add_argument("--gpus", type=at_least(1), default=1, help="GPUs the run would have (default 1)")
    plan.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="only this ZeRO stage (default: all, and offload)")
    plan.add_argument(
        "--measure", action="store_true", help="also time a phrase at test on this machine, where the model fits"
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")

    config = _command(commands, "config", "the shipped run configs and every field")
    config_commands = config.add_subparsers(metavar="WHAT", required=True)
    _command(config_commands, "list", "names of the shipped run configs", run_config_list)
    show = _command(
        config_commands, "show", "a complete run config as YAML, defaults and overrides applied", run_config_show
    )
    _add_config_options(show)
    fields = _command(config_commands, "fields", "every field: type, default, meaning", run_config_fields)
    fields.add_argument("match", nargs="?", default="", help="only fields whose name holds this text")
    return parser


def run_train(arguments: argparse.Namespace) -> int:
    """Starts a training run."""
    from deris_llm.config import load_config

    config = load_config(arguments.config, arguments.set)  # what is wrong is said once, not by every rank
    from deris_llm.config.protocols import protocols_of
    from deris_llm.data.sources import check_data_names

    check_data_names(config)
    protocols_of(config)
    from deris_llm.training.launch import launch, num_ranks, source_root  # bring torch, for which no check waits
    from deris_llm.training.run import check_start

    check_start(
        config,
        output=arguments.output or Path("runs") / config.name,
        deepspeed=Path(arguments.deepspeed or source_root() / "ds_configs" / "zero2.json"),
        resume=arguments.resume or "auto",
        fast_dev_run=arguments.fast_dev_run,
        num_ranks=num_ranks(arguments.gpus),
    )
    return launch(
        arguments.config,
        overrides=arguments.set,
        output=arguments.output,
        deepspeed=arguments.deepspeed,
        resume=arguments.resume,
        fast_dev_run=arguments.fast_dev_run,
        allow_other_data=arguments.allow_other_data,
        gpus=arguments.gpus,
    )


def run_eval(arguments: argparse.Namespace) -> int:
    """Evaluates; with several ranks this process starts them, and each runs this command again."""
    from deris_llm.checkpoints.layout import CONFIG_FILE, find_checkpoint
    from deris_llm.config import load_config

    arguments.allow_module = True  # a run config is the user's own
    if arguments.checkpoint:
        arguments.checkpoint, arguments.allow_module = find_checkpoint(arguments.checkpoint, arguments.set)
    if arguments.protocol:
        arguments.set = [*arguments.set, f"evaluation.protocols={json.dumps(arguments.protocol)}"]
    if "RANK" in os.environ:
        return _evaluate_on_this_rank(arguments)
    config = load_config(arguments.config or arguments.checkpoint / CONFIG_FILE, arguments.set)
    from deris_llm.config.protocols import protocols_of
    from deris_llm.data.sources import check_split

    protocols_of(config)
    if arguments.sweep:
        without = [name for name in ("config", "splits", "control", "output") if getattr(arguments, name)]
        if without:
            raise ValueError(
                f"--sweep: expected --checkpoint alone, got --{without[0]} too: it chooses a threshold and reports nothing else"
            )
        if not os.access(arguments.checkpoint, os.W_OK):
            raise ValueError(
                f"--sweep: expected a checkpoint that can be written to, got {arguments.checkpoint}: copy it"
            )
        from deris_llm.evaluation.sweep import check_sweep

        check_sweep(config, arguments.sweep)
    for name in [arguments.sweep] if arguments.sweep else arguments.splits or config.data.eval:
        check_split(config.data.root, name)
    from deris_llm.training.launch import num_ranks

    if not arguments.sweep:
        from deris_llm.evaluation.output import check_writable

        check_writable(arguments.output or Path("runs", "eval"))
    ranks = num_ranks(arguments.gpus)
    if ranks > 1:
        from deris_llm.evaluation.launch import run_on_ranks

        return run_on_ranks(arguments.argv, ranks)
    return _evaluate_on_this_rank(arguments)


def _evaluate_on_this_rank(arguments: argparse.Namespace) -> int:
    import torch
    from torch import distributed

    from deris_llm.checkpoints.fingerprints import checkpoint_fingerprint
    from deris_llm.common.ranks import OtherRankError
    from deris_llm.common.terminal import console
    from deris_llm.evaluation.calibration import calibrated
    from deris_llm.evaluation.output import default_folder
    from deris_llm.evaluation.report import report_table, sweep_table
    from deris_llm.evaluation.run import run_evaluation
    from deris_llm.evaluation.sweep import sweep
    from deris_llm.models.cognition import build_processor
    from deris_llm.models.cpu_inference import for_cpu_inference
    from deris_llm.models.out_of_memory import explains_out_of_memory

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.getLogger().setLevel(logging.INFO if rank == 0 else logging.WARNING)
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    config, model = _model_to_evaluate(arguments, device)
    for_cpu_inference(model)
    if world_size > 1:
        distributed.init_process_group("gloo")  # only Python objects travel
    shown = console()
    about: dict[str, Any] = {}
    notes: dict[str, list[str]] = {}
    of_checkpoint: Path | None = arguments.checkpoint
    named = Path("runs", "eval", f"{config.name}-step0")
    present = config.evaluation.score_threshold
    if of_checkpoint is not None:
        used = calibrated(of_checkpoint, config, arguments.set)
        present = used.config.evaluation.score_threshold
        if not arguments.sweep:
            fingerprint = checkpoint_fingerprint(of_checkpoint)
            about = {
                "checkpoint": str(of_checkpoint),
                "fingerprint": fingerprint,
                "threshold_source": used.source,
            }
            config, notes = used.config, used.notes
            named = default_folder("eval", config.name, fingerprint, config.evaluation)
    try:
        if arguments.sweep and of_checkpoint is not None:
            processor = build_processor(config, allow_module=arguments.allow_module)
            with explains_out_of_memory(config):
                chosen = sweep(
                    model,
                    config,
                    processor,
                    arguments.sweep,
                    present=present,
                    max_images=arguments.max_images,
                )
            if rank == 0:
                written = chosen.write(of_checkpoint)
                shown.print(sweep_table(chosen))
                shown.print(f"written to {written}", soft_wrap=True)
            return 0
        output = arguments.output or named
        with explains_out_of_memory(config):
            report = run_evaluation(
                config,
                model,
                build_processor(config, allow_module=arguments.allow_module),
                arguments.splits or config.data.eval,
                out=output,
                control=arguments.control,
                step0=arguments.checkpoint is None,
                max_images=arguments.max_images,
                about=about,
                notes=notes,
            )
    except OtherRankError as error:  # it said why, and so does this one
        raise ValueError(str(error)) from error
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    if rank == 0:
        if arguments.checkpoint is not None:
            shown.print(report_table(report))
        shown.print(f"written to {output}", soft_wrap=True)
    return 0


def _model_to_evaluate(arguments: argparse.Namespace, device: torch.device) -> tuple[RunConfig, nn.Module]:
    from transformers import set_seed

    from deris_llm.checkpoints.load import load_checkpoint
    from deris_llm.config import load_config
    from deris_llm.models.deris import build_model
    from deris_llm.models.out_of_memory import explains_out_of_memory

    if arguments.checkpoint is not None:
        return load_checkpoint(
            arguments.checkpoint, device, overrides=arguments.set, allow_module=arguments.allow_module
        )
    config = load_config(arguments.config, arguments.set)
    set_seed(config.training.seed)  # the fresh parts are those that training would start from
    with explains_out_of_memory(config, loading=True):
        return config, build_model(config, device=device).eval()


def run_score(arguments: argparse.Namespace) -> int:
    """Scores a file of predictions."""
    for given in filter(None, (arguments.predictions, arguments.against)):
        if not given.exists():
            raise ValueError(
                f"{given}: expected a JSONL file or a folder of predictions, got none at {given.absolute()}"
            )
    from deris_llm.config.protocols import protocols_of_file
    from deris_llm.data.sources import check_split

    check_split(arguments.data, arguments.split)
    protocols_of_file(arguments.protocol, text_field=arguments.phrase_field)

    from deris_llm.common.terminal import console
    from deris_llm.evaluation.comparison import comparison_table
    from deris_llm.evaluation.output import check_writable
    from deris_llm.evaluation.report import report_table
    from deris_llm.evaluation.score import default_folder
    from deris_llm.evaluation.score import run_score as score

    output = arguments.output or default_folder(arguments.predictions, arguments.split, arguments.against)
    check_writable(arguments.output or Path("runs", "score"))
    report, comparison = score(
        arguments.predictions,
        data_root=arguments.data,
        split=arguments.split,
        out=output,
        protocols=arguments.protocol,
        phrase_field=arguments.phrase_field,
        against=arguments.against,
        workers=arguments.workers,
    )
    shown = console()
    shown.print(report_table(report))
    if comparison is not None:
        shown.print(comparison_table(comparison))
    shown.print(f"written to {output}", soft_wrap=True)
    return 0


def run_predict(arguments: argparse.Namespace) -> int:
    """Answers phrases about pictures."""
    from deris_llm.checkpoints.layout import find_checkpoint

    arguments.checkpoint = find_checkpoint(arguments.checkpoint).folder
    from deris_llm.common.terminal import console
    from deris_llm.serving.predict import run, show_predictions

    result = run(
        arguments.checkpoint,
        arguments.image,
        arguments.phrase,
        jsonl=arguments.jsonl,
        out=arguments.out,
        overrides=arguments.set,
        overlays=arguments.overlay,
        instances=arguments.instances,
        skip_bad=arguments.skip_bad,
        exif=arguments.exif,
    )
    show_predictions(result, console())
    return 0


def run_report(arguments: argparse.Namespace) -> int:
    """Writes the page of an evaluation or a run."""
    from deris_llm.checkpoints.layout import find_checkpoint

    for folder in filter(None, (arguments.folder, arguments.against, arguments.data)):
        if not folder.is_dir():
            raise ValueError(
                f"report {folder}: expected the folder of an evaluation or a run (--data: of the data), got "
                f"{'a file' if folder.exists() else 'none'} at {folder.absolute()}"
            )
    if arguments.checkpoint is not None:
        arguments.checkpoint = find_checkpoint(arguments.checkpoint).folder

    from deris_llm.evaluation.page.page import look_inside, page_file, write_page
    from deris_llm.evaluation.page.stored import open_evaluation

    evaluation = open_evaluation(arguments.folder, arguments.checkpoint)
    if arguments.checkpoint is not None:
        evaluation = look_inside(evaluation, arguments.checkpoint, data_root=arguments.data, seed=arguments.seed)
    against = open_evaluation(arguments.against) if arguments.against is not None else None
    out = arguments.out or arguments.folder / page_file(against)
    path = write_page(evaluation, out, data_root=arguments.data, against=against, seed=arguments.seed)
    sys.stdout.write(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB)\n")
    return 0


def run_plan(arguments: argparse.Namespace) -> int:
    """Plans a run."""
    from rich.console import Console

    from deris_llm.config import load_config

    config = load_config(arguments.config, arguments.set)
    with contextlib.redirect_stdout(sys.stderr):  # libraries greet on stdout when they are imported
        from deris_llm.planning.efficiency import efficiency_of, show_efficiency, show_work, work_of_run
        from deris_llm.planning.plan import STAGES, plan_run, show_plan

        stages = STAGES if arguments.zero is None else [s for s in STAGES if s.startswith(str(arguments.zero))]
        plan = plan_run(config, gpus=arguments.gpus, stages=stages)
        work = work_of_run(config, plan)
        efficiency = efficiency_of(config, measure=arguments.measure)
    if arguments.json:
        more = {"work": work.to_json(), "efficiency": efficiency.to_json()}
        sys.stdout.write(json.dumps(plan.to_json() | more, indent=1) + "\n")
    else:
        show_plan(plan, Console())
        show_work(work, Console())
        show_efficiency(efficiency, Console())
    return 0


def run_config_list(_: argparse.Namespace) -> int:
    """Lists the shipped run configs."""
    from deris_llm.config import config_names

    sys.stdout.write("\n".join(config_names()) + "\n")
    return 0


def run_config_show(arguments: argparse.Namespace) -> int:
    """Prints a complete run config."""
    from deris_llm.common.strict_files import dump_yaml
    from deris_llm.config import config_to_dict, load_config

    sys.stdout.write(dump_yaml(config_to_dict(load_config(arguments.config, arguments.set))))
    return 0


def run_config_fields(arguments: argparse.Namespace) -> int:
    """Prints every field with its type, default and meaning."""
    from rich.padding import Padding

    from deris_llm.common.terminal import console
    from deris_llm.config import iter_fields

    shown = console()
    found = [field for field in iter_fields() if arguments.match in field[0]]
    if not found:
        raise ValueError(f"config fields: expected part of a field's name, got {arguments.match!r}, which none holds")
    for name, kind, default, about, bounds, _ in found:
        typed = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
        shown.print(f"{name}: {typed.replace('typing.', '')} = {default!r}")
        shown.print(Padding(f"{about}; in {bounds}" if bounds else about, (0, 0, 0, 4)))
    return 0


def _command(
    commands: Any, name: str, about: str, run: Callable[[argparse.Namespace], int] | None = None
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME|FILE",
        help="a shipped run config (deris-llm config list) or a .yaml file",
    )
    _add_override_option(parser)


def _add_override_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="A.B=VALUE",
        help="override fields of the config (deris-llm config fields), e.g. training.epochs=5",
    )


if __name__ == "__main__":
    sys.exit(main())
