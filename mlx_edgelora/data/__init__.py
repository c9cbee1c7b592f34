"""Data sets: formats of rows, labels and batches."""

from mlx_edgelora.data.batches import Batch, iterate_batches
from mlx_edgelora.data.dataset import DataReport, Dataset, Row
from mlx_edgelora.data.load import load_datasets

__all__ = ["Batch", "DataReport", "Dataset", "Row", "iterate_batches", "load_datasets"]
