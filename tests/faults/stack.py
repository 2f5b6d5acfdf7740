"""Imports all that training needs, once for the process that runs are forked from: see runs.py."""

from latent_diffusion import runtime

runtime.start()
runtime.import_paddlenlp()

import visualdl  # noqa: E402, F401

import dit.loop  # noqa: E402, F401
import dit.trainer  # noqa: E402, F401
import sdxl_lora.trainer  # noqa: E402, F401
import uvit_ldm.trainer  # noqa: E402, F401
from latent_diffusion import training_arguments  # noqa: E402, F401
