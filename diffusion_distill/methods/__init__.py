"""Training methods: the teacher's denoising loss and the distillers, as values with phases and a loss."""

from diffusion_distill.methods.denoising import Denoising
from diffusion_distill.methods.guided import Guided
from diffusion_distill.methods.knowledge import Knowledge
from diffusion_distill.methods.method import Distiller, Method
from diffusion_distill.methods.progressive import Progressive
from diffusion_distill.methods.tract import Tract

#: Methods that turn a teacher into a student.
DISTILLERS = {"btd": Progressive, "guided": Guided, "knowledge": Knowledge, "tract": Tract}

__all__ = ["DISTILLERS", "Denoising", "Distiller", "Guided", "Knowledge", "Method", "Progressive", "Tract"]
