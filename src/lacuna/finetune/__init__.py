"""LoRA and QLoRA: TRL's trainer, PEFT's adapters and bitsandbytes' quantisation, in lacuna's run folder."""

import logging
import warnings

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
