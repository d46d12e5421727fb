"""Pre-training of the tiny Mask2Former-Swin on instance masks of synthetic scenes (class i = KINDS[i]).

Real transformers classes and their own loss; one thread. It learns from the sparse scenes of the pool alone: with crowds among
them its masks were better, but the loopback that starts from it learned more slowly (docs/log.md).

Letters in shapes: B images, N objects of an image, Q queries, H = W = 128 px.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    SwinConfig,
)

from deris_llm.common.folders import finish_replacement, written_aside
from deris_llm.data.synthetic.vocabulary import KINDS
from scripts.pretrain_tiny.pool import PERCEPTION_SIZE, ScenePool

logger = logging.getLogger(__name__)

IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet, of RGB in [0, 1]
IMAGE_STD = (0.229, 0.224, 0.225)
ORDER_STREAM, AUGMENT_STREAM = 0x9101, 0x9102  # second words of the seeds of the data order and of the augmentation
MIN_OBJECT_PIXELS = 4  # at 128 px; smaller remnants of hidden objects are neither taught nor measured
GRADIENT_CLIP = 1.0
STATE_FILE = "training_state.safetensors"


def build_model() -> Mask2FormerForUniversalSegmentation:
    """The tiny Mask2Former with random weights: 2.5 M parameters, 3 masked-attention layers, 20 queries."""
    backbone = SwinConfig(
        image_size=PERCEPTION_SIZE,
        patch_size=4,
        embed_dim=32,
        depths=[1, 1, 3, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],  # pyright: ignore[reportCallIssue] (a backbone's option, typed nowhere)
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=96,
        mask_feature_size=96,
        hidden_dim=96,
        encoder_layers=2,
        encoder_feedforward_dim=256,
        dim_feedforward=256,
        num_attention_heads=8,
        decoder_layers=4,  # the library builds one layer less: the first prediction comes from the queries alone
        num_queries=20,
        train_num_points=1024,
        common_stride=4,
        feature_strides=[4, 8, 16, 32],
        id2label=dict(enumerate(KINDS)),
        label2id={kind: index for index, kind in enumerate(KINDS)},
    )
    return Mask2FormerForUniversalSegmentation(config)


def normalised(images_BHW3: np.ndarray | Tensor) -> Tensor:
    """Pixel values (B, 3, H, W) float32 of RGB pictures in [0, 255], by ImageNet's mean and deviation."""
    images = torch.as_tensor(images_BHW3).float().div(255).permute(0, 3, 1, 2)
    return ((images - torch.tensor(IMAGE_MEAN)[:, None, None]) / torch.tensor(IMAGE_STD)[:, None, None]).contiguous()


def scene_targets(instance_ids_HW: np.ndarray, record: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Masks float (N, H, W) and classes int64 (N,) of a scene's objects that are big enough to be seen."""
    kept = [
        index
        for index in range(len(record["objects"]))
        if np.count_nonzero(instance_ids_HW == index + 1) >= MIN_OBJECT_PIXELS
    ]
    masks = instance_ids_HW[None] == np.array(kept, np.uint8)[:, None, None] + 1
    classes = [KINDS.index(record["objects"][index]["kind"]) for index in kept]
    return torch.from_numpy(masks).float(), torch.tensor(classes, dtype=torch.int64)


def training_batch(pool: ScenePool, step: int, *, seed: int, batch_size: int) -> dict[str, Any]:
    """The batch of a step, a function of seed and step alone (so that a resumed run sees the same data).

    Augmented by horizontal flips and by jitter of brightness, contrast and the three colour channels.
    """
    sparse = np.arange(0, len(pool), 2)  # scenes with odd numbers are crowds
    steps_per_epoch = len(sparse) // batch_size
    epoch, position = divmod(step, steps_per_epoch)
    order = sparse[np.random.default_rng([seed, ORDER_STREAM, epoch]).permutation(len(sparse))]
    chosen = np.sort(order[position * batch_size : (position + 1) * batch_size])
    rng = np.random.default_rng([seed, AUGMENT_STREAM, step])
    images = torch.from_numpy(pool.images_128[chosen]).float()
    gain = torch.from_numpy(
        rng.uniform(0.85, 1.15, (batch_size, 1, 1, 1)) * rng.uniform(0.93, 1.07, (batch_size, 1, 1, 3))
    )
    contrast = torch.from_numpy(rng.uniform(0.85, 1.15, (batch_size, 1, 1, 1)))
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (((images - mean) * contrast + mean) * gain).clamp(0, 255).float()
    masks, classes = [], []
    for row, (index, flip) in enumerate(zip(chosen, rng.random(batch_size) < 0.5, strict=True)):
        mask, scene_classes = scene_targets(pool.instance_ids[index], pool.records[index])
        if flip:
            images[row] = images[row].flip(1)
            mask = mask.flip(2)
        masks.append(mask)
        classes.append(scene_classes)
    return {"pixel_values": normalised(images), "mask_labels": masks, "class_labels": classes}


@torch.no_grad()
def evaluate(model: Mask2FormerForUniversalSegmentation, pool: ScenePool, *, batch_size: int = 50) -> dict[str, float]:
    """How well the best query of each object covers it, over all objects of a pool.

    Returns:
        `mean_best_iou` and `share_iou_50`, `share_iou_80` in [0, 1]: IoU of the query whose mask (logits upsampled to
        128 px, threshold 0) fits the object best; `class_accuracy` of that query; `num_objects`, `num_images`.
    """
    was_training = model.training
    model.eval()
    best_ious, hits = [], []
    for start in range(0, len(pool), batch_size):
        rows = range(start, min(start + batch_size, len(pool)))
        output = model(pixel_values=normalised(np.array(pool.images_128[rows.start : rows.stop])))
        logits_BQHW = torch.nn.functional.interpolate(
            output.masks_queries_logits, size=(PERCEPTION_SIZE, PERCEPTION_SIZE), mode="bilinear", align_corners=False
        )
        for row, predicted, class_logits in zip(rows, logits_BQHW > 0, output.class_queries_logits, strict=True):
            masks, classes = scene_targets(pool.instance_ids[row], pool.records[row])
            predicted, masks = predicted.flatten(1).float(), masks.flatten(1)
            intersection_NQ = masks @ predicted.T
            union_NQ = masks.sum(1)[:, None] + predicted.sum(1) - intersection_NQ
            best = (intersection_NQ / union_NQ).max(1)
            best_ious.append(best.values)
            hits.append(class_logits[best.indices, :-1].argmax(1) == classes)
    model.train(was_training)
    ious = torch.cat(best_ious)
    return {
        "mean_best_iou": ious.mean().item(),
        "share_iou_50": (ious >= 0.5).float().mean().item(),
        "share_iou_80": (ious >= 0.8).float().mean().item(),
        "class_accuracy": torch.cat(hits).float().mean().item(),
        "num_objects": len(ious),
        "num_images": len(pool),
    }


def learning_rate_at(step: int, *, steps: int, peak: float, warmup_steps: int) -> float:
    """Linear warm-up to `peak`, then half a cosine down to 1 % of it at `steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress)))


def pretrain_perception(
    out: Path,
    pool: Path,
    *,
    seed: int,
    steps: int,
    batch_size: int = 8,
    learning_rate: float = 4e-4,
    warmup_steps: int = 200,
    evaluate_every: int = 500,
    checkpoint_seconds: float = 300.0,
) -> dict[str, Any]:
    """Train the tiny Mask2Former; continues from `out` when an unfinished run is there.

    Args:
        out: folder of the model (fp16 safetensors, config, image processor, metrics, README). It is renewed at each
            checkpoint, written aside and renamed; the optimizer's state lies in `<out>.state` until the run ends.
        pool: folder with the pools `train` and `held_out`.
        seed: of weights, data order, augmentation and sampled points.
        steps: optimizer steps.
        batch_size: images a step.
        learning_rate: peak rate of AdamW.
        warmup_steps: steps of linear warm-up.
        evaluate_every: steps between measurements on `held_out`.
        checkpoint_seconds: seconds between checkpoints.

    Returns:
        The final metrics as in `metrics.json`.

    Raises:
        ValueError: the loss is no longer finite.
    """
    torch.set_num_threads(1)
    train_pool, held_out_pool = ScenePool(pool / "train"), ScenePool(pool / "held_out")
    torch.manual_seed(seed)
    model = build_model().train()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=learning_rate, fused=True)
    run = {"seed": seed, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    state_folder = out.with_name(out.name + ".state")
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "loss": float("nan"), "history": [], "run": run}
    finish_replacement(state_folder)
    if (state_folder / STATE_FILE).exists():
        progress = _load_state(state_folder, model, optimizer, run)
        logger.info("perception: continuing at step %d", progress["step"])
    seconds, running_loss, history = progress["seconds"], progress["loss"], progress["history"]
    started = last_checkpoint = time.monotonic()
    for step in range(progress["step"], steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps=steps, peak=learning_rate, warmup_steps=warmup_steps)
        torch.manual_seed(seed * 1_000_003 + step)  # points sampled by the loss: a function of the step, as the data
        batch = training_batch(train_pool, step, seed=seed, batch_size=batch_size)
        loss = training_loss(model, batch)
        if not torch.isfinite(loss):
            raise ValueError(
                f"pretrain_perception, step {step}: expected a finite loss, got {loss.item()}; the last checkpoint in "
                f"{out} is whole. Lower learning_rate ({learning_rate}) and start again."
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        running_loss = loss.item() if running_loss != running_loss else 0.98 * running_loss + 0.02 * loss.item()
        done = step + 1
        if done % evaluate_every == 0 or done == steps:
            elapsed = seconds + time.monotonic() - started
            metrics = evaluate(model, held_out_pool)
            history.append({"step": done, "seconds": round(elapsed), "loss": running_loss, **metrics})
            logger.info("perception step %d/%d, held out: %s", done, steps, _line(metrics))
        if done % 50 == 0:
            elapsed = seconds + time.monotonic() - started
            logger.info("perception step %d/%d, %.0f s, loss %.3f", done, steps, elapsed, running_loss)
        if history and (time.monotonic() - last_checkpoint > checkpoint_seconds or done == steps):
            elapsed = seconds + time.monotonic() - started
            progress.update(step=done, seconds=elapsed, loss=running_loss)
            _save_state(state_folder, model, optimizer, progress)
            _save_model(out, model, {**run, "finished_steps": done, "seconds": round(elapsed), "history": history})
            last_checkpoint = time.monotonic()
    shutil.rmtree(state_folder, ignore_errors=True)
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


def parameter_groups(model: Mask2FormerForUniversalSegmentation) -> list[dict[str, Any]]:
    """Weight decay 0.05 on matrices; none on embeddings, norms and biases (as in Mask2Former, section 4.1)."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() > 1 and "embed" not in name else plain).append(parameter)
    return [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]


def training_loss(model: Mask2FormerForUniversalSegmentation, batch: dict[str, Any]) -> Tensor:
    """The library's own loss: classes, points' cross-entropy, dice, all rounds."""
    return model(**batch, output_auxiliary_logits=True).loss


def _line(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if isinstance(value, float))


def _state_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield f"model.{name}", parameter.data
        for key, value in optimizer.state[parameter].items():
            yield f"optimizer.{name}.{key}", value


def _save_state(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    with written_aside(folder) as aside:
        save_file(
            dict(_state_tensors(model, optimizer)), aside / STATE_FILE, metadata={"progress": json.dumps(progress)}
        )
        (aside / "progress.json").write_text(json.dumps(progress), encoding="utf-8")


def _load_state(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]
) -> dict[str, Any]:
    """Restore weights and optimizer in place; returns the progress of the run so far."""
    progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    if progress["run"] != run:
        raise ValueError(
            f"pretrain_perception: expected the unfinished run in {folder} to have the settings {run}, got "
            f"{progress['run']}; use the same settings, or delete that folder to start anew."
        )
    tensors = load_file(folder / STATE_FILE)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"model.{name}"])
        prefix = f"optimizer.{name}."
        optimizer.state[parameter] = {
            key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
        }
    return progress


def _save_model(out: Path, model: Mask2FormerForUniversalSegmentation, metrics: dict[str, Any]) -> None:
    """Write the folder that `from_pretrained` reads: fp16 weights, config, image processor, metrics, README."""
    half = Mask2FormerForUniversalSegmentation(model.config)
    half.load_state_dict(model.state_dict())
    image_processor = Mask2FormerImageProcessorPil(
        do_resize=True,
        size={"height": PERCEPTION_SIZE, "width": PERCEPTION_SIZE},
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        resample=3,
        ignore_index=255,
    )
    with written_aside(out) as aside:
        half.half().save_pretrained(aside)
        image_processor.save_pretrained(aside)
        (aside / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(_readme(metrics), encoding="utf-8")


def _readme(metrics: dict[str, Any]) -> str:
    last = metrics["history"][-1]
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in last.items())
    return (
        "# Tiny Mask2Former-Swin\n\n"
        "`Mask2FormerForUniversalSegmentation`, fp16; instance masks of synthetic scenes warped to "
        f"{PERCEPTION_SIZE} x {PERCEPTION_SIZE} px, normalised by ImageNet's mean and deviation. "
        f"Classes: {', '.join(KINDS)}.\n\n"
        f"Made by `scripts/pretrain_tiny/run.py`: seed {metrics['seed']}, "
        f"{metrics['finished_steps']} of {metrics['steps']} steps of {metrics['batch_size']} images, AdamW "
        f"{metrics['learning_rate']}, {metrics['seconds'] / 60:.0f} minutes on one core, sparse scenes only. "
        "Scenes come from a seed stream disjoint from every split.\n\n"
        "Measured on held-out scenes, half of them crowds with more objects than queries (the query that fits an object best; "
        "mask at 128 px):\n\n"
        f"| | |\n| --- | --- |\n{rows}\n"
    )
