"""Models built from the layers of `chronotope.nn`."""

from chronotope.models.classifier import Classifier
from chronotope.models.clip_classifier import ClipClassifier
from chronotope.models.events import Events
from chronotope.models.forecaster import Forecaster
from chronotope.models.frames import Continuation, EncoderForecaster
from chronotope.models.language import Language
from chronotope.models.motion import Motion
from chronotope.models.predictor import Predictor
from chronotope.models.trajectory import Trajectory
from chronotope.models.video_dit import VideoDiT

__all__ = [
    "Classifier",
    "ClipClassifier",
    "Continuation",
    "EncoderForecaster",
    "Events",
    "Forecaster",
    "Language",
    "Motion",
    "Predictor",
    "Trajectory",
    "VideoDiT",
]
