"""Checkpoints as generations: written beside training, whole or not there, read into any number of ranks."""

from pipeline.checkpoint.config import CheckpointConfig
from pipeline.checkpoint.generations import (
    CONFIG_NAME,
    LABEL_MAP_NAME,
    PROGRESS_NAME,
    generation_name,
    publish_generation,
    recorded_sha256,
    temporary_folder,
    verify_generation,
    write_json,
)
from pipeline.checkpoint.reader import Generation, latest_generation, newest_record, newest_whole
from pipeline.checkpoint.universal import export_universal
from pipeline.checkpoint.writer import EMA_NAME, WEIGHTS_NAME, CheckpointWriter, Saved, SaveTimes

__all__ = [
    "CONFIG_NAME",
    "EMA_NAME",
    "LABEL_MAP_NAME",
    "PROGRESS_NAME",
    "WEIGHTS_NAME",
    "CheckpointConfig",
    "CheckpointWriter",
    "Generation",
    "SaveTimes",
    "Saved",
    "export_universal",
    "generation_name",
    "latest_generation",
    "newest_record",
    "newest_whole",
    "publish_generation",
    "recorded_sha256",
    "temporary_folder",
    "verify_generation",
    "write_json",
]
