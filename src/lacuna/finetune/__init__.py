"""LoRA and QLoRA: TRL's trainer, PEFT's adapters and bitsandbytes' quantisation, in lacuna's run folder."""
