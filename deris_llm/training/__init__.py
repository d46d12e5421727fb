"""Fine-tuning: transformers' Trainer under DeepSpeed, from a run config to a checkpoint folder.

`run.train` is the whole of it, `launch.launch` starts it on all GPUs (or two CPU ranks), `checkpoints.load_checkpoint`
reads what it wrote.
"""
