"""Hints for options of other tools and of older versions of mlx-lm: what to write instead."""

ITERS = "write epochs, or iters for steps"
SAVES = "write save_every"
LOSS = "write loss: dpo, orpo, simpo or kto"

HINTS = {
    "train_mode": LOSS,
    "train_type": "write fine_tune_type for adapters, or loss for dpo, orpo, simpo and kto",
    "loss_type": LOSS,
    "dpo_cpo_loss_type": LOSS,
    "lora_layers": "write num_layers, its name in mlx-lm today",
    "steps_per_save": SAVES,
    "save_steps": SAVES,
    "num_epochs": ITERS,
    "num_train_epochs": ITERS,
    "max_steps": "write iters",
    "use_dora": "write fine_tune_type: dora",
    "lora_rank": "write rank under lora_parameters in a config file",
    "lora_alpha": "write scale under lora_parameters in a config file: alpha / rank elsewhere",
    "use_rslora": "write use_rslora under lora_parameters in a config file",
    "loraplus_lr_embedding": "adapters of embeddings have the rates of all others; take it out",
    "lora_dropout": "write dropout under lora_parameters in a config file",
    "gradient_accumulation_steps": "write grad_accumulation_steps",
    "gradient_checkpointing": "the memory budget decides what is recomputed; take it out",
    "per_device_train_batch_size": "write batch_size",
    "eval_steps": "write steps_per_eval",
    "logging_steps": "write steps_per_report",
    "output_dir": "write adapter_path",
    "dataset": "write data",
    "validation_split": "write val_split",
    "completion_only": "write mask_prompt",
    "train_on_completions": "write mask_prompt",
}
