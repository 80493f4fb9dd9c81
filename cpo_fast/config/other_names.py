"""What TRL, transformers, PEFT, LLaMA-Factory and axolotl call our keys, for whoever types their names."""

# their name -> our key
NAMES = {
    "learning_rate": "train.lr",
    **dict.fromkeys(("num_train_epochs", "epochs"), "train.num_epochs"),
    **dict.fromkeys(("output_dir", "run_name"), "run"),
    **dict.fromkeys(("data_seed", "seed"), "seed"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "train.schedule"),
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_last",
    "early_stopping_patience": "train.patience",
    "report_to": "train.trackers",
    "optim": "train.optimizer",
    "adam_epsilon": "train.adam_eps",
    "label_smoothing_factor": "train.label_smoothing",
    "pref_beta": "train.beta",
    "pref_loss": "train.loss_type",
    **dict.fromkeys(("rpo_alpha", "pref_ftx"), "train.nll_weight"),
    "ref_model": "train.reference_model",
    "precompute_ref_log_probs": "train.reference",
    "ddp_timeout": "train.collective_timeout",
    **dict.fromkeys(("max_steps", "warmup_ratio", "weight_decay", "beta", "loss_type", "deepspeed"), "train.{}"),
    **dict.fromkeys(("model_name_or_path", "model_name", "base_model"), "model.path"),
    "adapter_name_or_path": "model.adapter",
    **dict.fromkeys(("torch_dtype", "dtype"), "model.dtype"),
    **dict.fromkeys(("dataset_name", "dataset", "datasets", "dataset_path", "train_file"), "data.path"),
    **dict.fromkeys(("test_size", "val_size", "val_set_size"), "data.held_out"),
    **dict.fromkeys(("lora_r", "lora_rank", "rank", "r"), "lora.r"),
    **dict.fromkeys(("lora_alpha", "alpha"), "lora.alpha"),
    **dict.fromkeys(("lora_target_modules", "lora_target", "target_modules"), "lora.target_modules"),
}
_BATCH = (
    "train.batch_pairs says how many pairs a step has on all GPUs together, and train.max_tokens how many tokens are "
    "computed at once"
)
_LENGTH = "data.max_length drops rows that are longer, and nothing is cut"
_QUANTISED = "there is none such here: a base is float32 or bfloat16 (model.dtype)"
# their name -> what there is in its place
NOTES = {
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "micro_batch_size"), _BATCH),
    **dict.fromkeys(("train_batch_size", "batch_size"), _BATCH),
    "per_device_eval_batch_size": "train.max_tokens says how many tokens are computed at once, in validation too",
    **dict.fromkeys(("max_length", "max_seq_length", "max_prompt_length", "max_completion_length"), _LENGTH),
    **dict.fromkeys(("cutoff_len", "sequence_len"), _LENGTH),
    "bf16": "set model.dtype=bfloat16",
    **dict.fromkeys(("fp16", "load_in_4bit", "load_in_8bit", "quantization_bit"), _QUANTISED),
    **dict.fromkeys(("lora_dropout", "dropout"), "there is none here: branches of a forest share what it would drop"),
    "warmup_steps": "train.warmup_ratio is their share of all steps",
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy"), "train.eval_every says how often, and data.held_out on how many rows"
    ),
    "save_strategy": "train.save_every says after how many steps",
    "load_best_model_at_end": "the best adapter is kept wherever data.held_out or train.stop_on measures it",
    "resume_from_checkpoint": "the same command goes on from the newest checkpoint by itself",
    "packing": "tokens that rows share are computed once, whatever is set",
    "trust_remote_code": "no file may allow that; write cpo-fast --trust-remote-code",
}
_SECTIONS = ("", "train", "data", "model", "lora")  # where one would write them


def hint(key: str) -> str:
    """What an unknown key is here, as the end of a sentence, or nothing."""
    section, _, name = key.rpartition(".")
    ours = NAMES.get(name, "").format(name)
    if section in _SECTIONS and ours not in ("", key):
        return f"; it is '{ours}' here"
    return f"; {NOTES[name]}" if section in _SECTIONS and name in NOTES else ""
