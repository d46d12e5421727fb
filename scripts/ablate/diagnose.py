#!/usr/bin/env python
"""What the rounds of a trained loopback do: masks and choices by round, gradients through C1, attention to the text.

For each round: the best query's IoU and that of the query with the highest referring score, how often the chosen query and
the query matched to a referent are another one than in the round before or cover another object there, and how the text
attention of the chosen query is spread over the words. By family of phrase as well. Letters as in `deris_llm.models.loopback`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import each other as `scripts.*`

from deris_llm.checkpoints.layout import find_checkpoint
from deris_llm.checkpoints.load import load_checkpoint
from deris_llm.config import RunConfig
from deris_llm.data.dataset import group_by_image, some_images
from deris_llm.data.formats.refer import dataset_paths
from deris_llm.data.loaders import evaluation_loader, train_loader
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.mix import training_mix
from deris_llm.data.sources import is_refer, read_split
from deris_llm.losses.criterion import build_criterion
from deris_llm.losses.matcher import match
from deris_llm.losses.point_sampling import random_points
from deris_llm.models.cognition import build_processor
from deris_llm.models.loopback import NUM_HEADS, Attention
from deris_llm.models.postprocess import readable_logits, upsampled_masks
from deris_llm.models.starts import GatedFusion
from deris_llm.structures import DerisOutput, ReferringBatch, ReferringRecord
from scripts.ablate.runs import write_json
from scripts.ablate.wording import FAMILIES, ROLES, families_of, token_roles

COVERS_FROM = 0.1  # IoU from which a query covers an object; below it covers none
GRADIENT_BATCHES = 4
CHANGES = ("chosen_query_changed", "chosen_object_changed", "matched_query_changed", "matched_object_changed")
MEASURES = {
    "oracle_iou": "best query, IoU",
    "chosen_iou": "chosen query, IoU",
    "chosen_is_referent": "chosen covers a referent",
    "chosen_query_changed": "chosen: another query",
    "chosen_object_changed": "chosen: its object changed",
    "matched_query_changed": "matched: another query",
    "matched_object_changed": "matched: its object changed",
}
"""Measure of a round, percent -> its column. The last four compare a query with the round before."""
ATTENTION = ("phrase", *ROLES)


class Trace(NamedTuple):
    """What the rounds made of one phrase."""

    family: str
    rounds: tuple[Mapping[str, float], ...]  # in [0, 1], by measure; without those that the round or the phrase has not
    attention: tuple[Mapping[str, float], ...]  # share of the chosen query's text attention, by `ATTENTION`
    uniform: Mapping[str, float]  # share of the tokens


def diagnose(
    config: RunConfig, model: nn.Module, split: str, *, max_images: int = 0, batches: int = GRADIENT_BATCHES
) -> dict[str, Any]:
    """Measures a model.

    Args:
        config: of the run.
        model: a `Deris`.
        split: ``dataset/split`` of REFER's files, whose instances.json has all objects of an image.
        max_images: evenly spaced images; 0 = all.
        batches: training batches whose gradients are measured; 0 = none, the training data is then not read.

    Returns:
        plain values: percent by round and by family, shares of attention, norms of gradients.

    Raises:
        ValueError: the split is a prepared set.
    """
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))
    records = list(some_images(read_split(config.data.root, split, phrase_field=config.data.phrase_field), max_images))
    families, source = families_of(records, Path(config.data.root))
    traces = trace(config, model, records, families)
    return {
        "split": split,
        "families_from": source,
        "n_phrases": len(traces),
        "rounds": _by_round(traces),
        "families": {
            family: {"n_phrases": len(members), "rounds": _by_round(members)}
            for family in FAMILIES
            if (members := [one for one in traces if one.family == family])
        },
        "attention": [_means(rounds, ATTENTION) for rounds in zip(*(one.attention for one in traces), strict=True)],
        "uniform_attention": _means([one.uniform for one in traces], ATTENTION),
        "gradients": fusion_gradients(config, model, batches=batches) if batches else [],
    }


# -- rounds ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def trace(
    config: RunConfig, model: nn.Module, records: Sequence[ReferringRecord], families: Mapping[str, str]
) -> list[Trace]:
    """Follows the queries of each phrase through the rounds; `families` by phrase id."""
    device = next(model.parameters()).device
    processor, objects = build_processor(config), objects_by_image(config, records[0].dataset)
    by_id = {record.phrase_id: record for record in records}
    model.eval()
    found = []
    for batch in evaluation_loader(config, records, processor):
        with _text_attention(model) as attention_PQL:
            output: DerisOutput = model(batch.to(device))
        matched_TR = _matched(config, output, batch.to(device)).cpu().numpy()
        tokens = _text_tokens(processor, batch)
        of_phrase = batch.targets.phrase_index.numpy() if batch.targets else np.zeros(0)
        for p, phrase_id in enumerate(batch.phrase_ids):
            record = by_id[phrase_id]
            iou_RQK, is_referent_K = _overlaps(output, p, record, objects[record.image_id])
            chosen = [int(one.referring_logits[p].argmax()) for one in output.rounds]
            rows = [
                weights_PQL[p, query].cpu().numpy() for weights_PQL, query in zip(attention_PQL, chosen, strict=True)
            ]
            roles = token_roles(record.phrase, tokens[p])
            found.append(
                Trace(
                    families[phrase_id],
                    tuple(_rounds(iou_RQK, is_referent_K, chosen, matched_TR[of_phrase == p])),
                    tuple(_shares(row[: len(roles)], roles) for row in rows),
                    _shares(np.full(len(roles), 1 / max(1, len(roles))), roles),
                )
            )
    return found


def objects_by_image(config: RunConfig, dataset: str) -> dict[str, list[tuple[int, object]]]:
    """Reads all objects of a dataset's images: image id -> annotation ids and segmentations.

    Raises:
        ValueError: a prepared set, which has the referents alone.
    """
    root = Path(config.data.root)
    if not is_refer(root, dataset):
        raise ValueError(f"{dataset}: expected REFER's files, whose instances.json has all objects, got a prepared set")
    tables = json.loads(dataset_paths(root, dataset)[1].read_bytes())
    names = {image["id"]: Path(image["file_name"]).stem for image in tables["images"]}
    found: dict[str, list[tuple[int, object]]] = defaultdict(list)
    for annotation in tables["annotations"]:
        found[names[annotation["image_id"]]].append((annotation["id"], annotation["segmentation"]))
    return found


def _overlaps(
    output: DerisOutput, p: int, record: ReferringRecord, objects: Sequence[tuple[int, object]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the IoU of every query with every object in every round, (R, Q, K), and which objects are referents."""
    size = (record.height, record.width)
    truths_KN = np.stack([decode_segmentation(each, *size).ravel() for _, each in objects]).astype(np.float32)
    referents = {instance.annotation_id for instance in record.instances}
    ious = []
    for one in output.rounds:
        of_phrase = dataclasses.replace(one, mask_logits=one.mask_logits[p : p + 1])
        single = dataclasses.replace(output, rounds=(of_phrase,))
        queries = range(one.mask_logits.shape[1])
        masks_QN = upsampled_masks(single, [queries], [size])[0].reshape(len(queries), -1).astype(np.float32)
        common_QK = masks_QN @ truths_KN.T
        union_QK = masks_QN.sum(axis=1)[:, None] + truths_KN.sum(axis=1) - common_QK
        ious.append(common_QK / np.maximum(union_QK, 1))
    return np.stack(ious), np.array([number in referents for number, _ in objects])


def _rounds(
    iou_RQK: np.ndarray, is_referent_K: np.ndarray, chosen: Sequence[int], matched_TR: np.ndarray
) -> Iterator[dict[str, float]]:
    """Yields the measures of each round of a phrase; none of a phrase without referent."""
    object_RQ = np.where(iou_RQK.max(axis=2) >= COVERS_FROM, iou_RQK.argmax(axis=2), -1)
    for r, (iou_QK, query) in enumerate(zip(iou_RQK, chosen, strict=True)):
        measures: dict[str, float] = {}
        if is_referent_K.any():
            of_referents = iou_QK[:, is_referent_K]
            covered = object_RQ[r, query]
            measures = {
                "oracle_iou": float(of_referents.max(axis=0).mean()),
                "chosen_iou": float(of_referents[query].max()),
                "chosen_is_referent": float(covered >= 0 and is_referent_K[covered]),
            }
            if r > 0:
                now, before = matched_TR[:, r], matched_TR[:, r - 1]
                is_there = (now >= 0) & (before >= 0)
                now, before = now[is_there], before[is_there]
                measures["chosen_query_changed"] = float(query != chosen[r - 1])
                measures["chosen_object_changed"] = float(covered != object_RQ[r - 1, query])
                if len(now):
                    measures["matched_query_changed"] = float((now != before).mean())
                    measures["matched_object_changed"] = float((object_RQ[r, now] != object_RQ[r - 1, now]).mean())
        yield measures


def _matched(config: RunConfig, output: DerisOutput, batch: ReferringBatch) -> Tensor:
    """Returns the query of each referent in each round as the loss matches them, int64 (T, R)."""
    assert batch.targets is not None, "loaded with targets"
    criterion, device = build_criterion(config), output.presence_logit.device
    rounds = tuple(
        dataclasses.replace(one, mask_logits=readable_logits(one.mask_logits, output.mask_upsampling))
        for one in output.rounds
    )
    generator = torch.Generator(device).manual_seed(0)
    points = random_points(batch.num_phrases, criterion.num_points, device=device, generator=generator)
    return match(dataclasses.replace(output, rounds=rounds), batch.targets, points, criterion.matching_weights)


# -- attention to the text -------------------------------------------------------------------------------------------


@contextmanager
def _text_attention(model: Any) -> Iterator[list[Tensor]]:
    """Collects the weights of the text attention in each round, mean over the heads: float (P, Q, L) each."""
    found: list[Tensor] = []
    hooks = [
        one.text_attention.register_forward_hook(
            lambda module, given, _: found.append(attention_weights(module, *given))
        )
        for one in model.loopback.cognition_rounds
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def attention_weights(attention: Attention, queries: Tensor, keys: Tensor, _: Tensor, mask: Tensor) -> Tensor:
    """Returns the weights that `Attention.forward` uses for these arguments, mean over the heads: float (P, Q, K)."""
    heads = [
        projection(tokens).unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2)
        for projection, tokens in ((attention.q_proj, queries), (attention.k_proj, keys))
    ]
    logits = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(heads[0].shape[-1])
    mask = mask[:, None, None, :]
    hidden = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    return hidden.softmax(dim=-1).mean(dim=1)


def _text_tokens(processor: Any, batch: ReferringBatch) -> list[list[str]]:
    """Returns the names of the tokens that become text features, phrase by phrase."""
    owner = getattr(processor, "prompts", None) or getattr(processor, "phrases", None) or processor
    tokenizer = owner.tokenizer
    ids = [
        row[chosen].tolist()
        for row, chosen in zip(batch.cognition.input_ids, batch.cognition.text_feature_mask, strict=True)
    ]
    if hasattr(tokenizer, "convert_ids_to_tokens"):
        return [tokenizer.convert_ids_to_tokens(each) for each in ids]
    from deris_llm.models.cognition.beit3 import EOS, PIECE_OFFSET

    names = lambda each: [tokenizer.id_to_piece(i - PIECE_OFFSET) if i > EOS else "" for i in each]  # noqa: E731
    return [names(each) for each in ids]


def _shares(weights: np.ndarray, roles: Sequence[str]) -> dict[str, float]:
    """Sums the weights of each role that the phrase has, and of all of its tokens."""
    of_role = {role: float(weights[np.array(roles) == role].sum()) for role in ROLES if role in roles}
    return {"phrase": float(weights[np.array(roles) != ""].sum()), **of_role} if any(roles) else {}


# -- gradients through C1 --------------------------------------------------------------------------------------------


def fusion_gradients(config: RunConfig, model: Any, *, batches: int) -> list[dict[str, float]]:
    """Measures the gradients of the training loss at each C1, means over batches of the training data.

    Returns:
        per C1 the norms of the gradient of its weights' perception and cognition half, and of the gradient that flows back to
        the perception and the cognition queries; for a gated one also the mean of |tanh g|.
    """
    device = next(model.parameters()).device
    torch.manual_seed(config.training.seed)
    loader = train_loader(config, group_by_image(training_mix(config.data).records), build_processor(config))
    criterion, found = build_criterion(config), [defaultdict(list) for _ in model.loopback.query_fusions]
    model.train()
    for _, batch in zip(range(batches), loader, strict=False):
        model.zero_grad()
        with _fusion_inputs(model.loopback.query_fusions) as pairs:
            batch = batch.to(device)
            criterion(model(batch), batch.targets).total.backward()
        for i, fusion in enumerate(model.loopback.query_fusions):
            linear = fusion.linear if isinstance(fusion, GatedFusion) else fusion
            for name, gradient in (("weight", linear.weight.grad), ("query", pairs[i].grad)):
                assert gradient is not None, "every parameter and query takes part in the loss"
                for half, part in zip(("perception", "cognition"), gradient.chunk(2, dim=-1), strict=True):
                    found[i][f"{name}_{half}"].append(float(part.norm()))
    model.zero_grad()
    model.eval()
    means = [{name: statistics.fmean(values) for name, values in one.items()} for one in found]
    for one, fusion in zip(means, model.loopback.query_fusions, strict=True):
        if isinstance(fusion, GatedFusion):
            one["gate"] = float(fusion.gate.detach().tanh().abs().mean())
    return means


@contextmanager
def _fusion_inputs(fusions: nn.ModuleList) -> Iterator[dict[int, Tensor]]:
    """Collects [q_p ; q_c] of each C1, which then keep their gradients."""
    found: dict[int, Tensor] = {}

    number = {id(fusion): i for i, fusion in enumerate(fusions)}

    def keep(fusion: nn.Module, given: tuple[Tensor]) -> None:
        given[0].retain_grad()
        found[number[id(fusion)]] = given[0]

    hooks = [fusion.register_forward_pre_hook(keep) for fusion in fusions]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


# -- tables ----------------------------------------------------------------------------------------------------------


def _by_round(traces: Sequence[Trace]) -> list[dict[str, float]]:
    """Means over phrases, percent, round by round."""
    rounds = zip(*(one.rounds for one in traces), strict=True)
    return [{name: 100 * value for name, value in _means(each, MEASURES).items()} for each in rounds]


def _means(rows: Iterable[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    """Means over the rows that have a value."""
    rows = list(rows)
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: statistics.fmean(each) for name, each in values.items() if each}


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The measurements for the terminal."""
    title = f"{found['split']}, {found['n_phrases']} phrases, percent"
    rounds = [[str(i), *_cells(row, MEASURES)] for i, row in enumerate(found["rounds"])]
    shown = [_table(f"Rounds: {title}", ["round", *MEASURES.values()], rounds)]
    last = len(found["rounds"]) - 1
    columns = [("oracle_iou", 0), ("oracle_iou", last), ("chosen_iou", 0), ("chosen_iou", last)]
    columns += [(name, last) for name in CHANGES]
    rows = [
        [family, str(one["n_phrases"]), *(_cell(one["rounds"][r].get(name)) for name, r in columns)]
        for family, one in found["families"].items()
    ]
    heads = [f"{MEASURES[name]}, round {r}" for name, r in columns]
    shown.append(
        _table(f"Families of phrases (by {found['families_from']}), percent", ["family", "phrases", *heads], rows)
    )
    percent = [{name: 100 * value for name, value in row.items()} for row in found["attention"]]
    uniform = {name: 100 * value for name, value in found["uniform_attention"].items()}
    rows = [[str(i), *_cells(row, ATTENTION)] for i, row in enumerate(percent)]
    rows.append(["share of the tokens", *_cells(uniform, ATTENTION)])
    heads = ["round", "all of the phrase", "head noun", "attributes", "relation", "its anchor", "other words"]
    shown.append(_table("Text attention of the chosen query, percent; a role: where the phrase has it", heads, rows))
    if found["gradients"]:
        names = list(found["gradients"][0])
        rows = [[str(i + 1), *(f"{row[name]:.2e}" for name in names)] for i, row in enumerate(found["gradients"])]
        shown.append(_table("Gradients of the training loss at C1, norms", ["before round", *names], rows))
    return shown


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _cells(row: Mapping[str, float], names: Iterable[str]) -> list[str]:
    return [_cell(row.get(name)) for name in names]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


# -- command line ----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The options of ``scripts/ablate/diagnose.py``."""
    parser = argparse.ArgumentParser(prog="diagnose.py", description=(__doc__ or "").partition(" Letters as")[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run, or `best` or `checkpoint-STEP` of one")
    parser.add_argument("--split", metavar="SPLIT", help="e.g. refcoco/val (default: training.eval_split of the run)")
    parser.add_argument("--max-images", type=int, default=0, metavar="N", help="images of it (default 0 = all)")
    parser.add_argument(
        "--batches", type=int, default=GRADIENT_BATCHES, metavar="N",
        help=f"training batches whose gradients are measured (default {GRADIENT_BATCHES}; 0 = none)",
    )  # fmt: skip
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="A.B=VALUE", help="overrides of the run config"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON (default: diagnosis.json in the run's folder)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``scripts/ablate/diagnose.py``.

    Args:
        argv: arguments; None reads the process's own.

    Returns:
        exit status: 0 done, 2 the input was wrong.
    """
    arguments = build_parser().parse_args(argv)
    try:
        folder, allow_module = find_checkpoint(arguments.checkpoint, arguments.set)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        overrides = ["training.precision=fp32", *arguments.set]  # gradients and attention are read in full precision
        config, model = load_checkpoint(folder, device, overrides=overrides, allow_module=allow_module)
        split = arguments.split or config.training.eval_split
        found = diagnose(config, model, split, max_images=arguments.max_images, batches=arguments.batches)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    output = arguments.output or folder.parent / "diagnosis.json"
    write_json(output, {"checkpoint": str(folder), "max_images": arguments.max_images, **found})
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    for table in tables(found):
        console.print(table)
    console.print(f"written to {output}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
