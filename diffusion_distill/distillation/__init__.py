"""Training methods: the teacher's denoising loss and the distillers, as values with phases and a loss."""

from diffusion_distill.distillation.denoising import Denoising
from diffusion_distill.distillation.knowledge import Knowledge
from diffusion_distill.distillation.progressive import Progressive
from diffusion_distill.distillation.tract import Tract

#: Methods that turn a teacher into a student.
DISTILLERS = {"btd": Progressive, "knowledge": Knowledge, "tract": Tract}

__all__ = ["DISTILLERS", "Denoising", "Knowledge", "Progressive", "Tract"]
