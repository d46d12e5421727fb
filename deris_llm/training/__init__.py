"""Fine-tuning: transformers' Trainer under DeepSpeed, from a run config to a checkpoint folder.

`run.train` trains on one rank; `launch.launch` starts `deris_llm.training` on all GPUs (or two CPU ranks).
"""
