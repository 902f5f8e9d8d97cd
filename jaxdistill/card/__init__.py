"""The model card of a student: what a stranger needs to know before using it, in the Hub's format."""

from jaxdistill.card.page import Published, Score, model_card
from jaxdistill.card.teacher import card_of, licence_of, teacher_facts

__all__ = ["Published", "Score", "card_of", "licence_of", "model_card", "teacher_facts"]
