"""Interaction data: fetching, reading, describing, splitting by users."""

from saerec_fast.data.dataset import Dataset, ItemTable, attribute_shares, common_attributes, describe
from saerec_fast.data.download import DownloadError, download
from saerec_fast.data.readers import read_dataset
from saerec_fast.data.splits import Split, cross_validation_splits, split_users
from saerec_fast.data.synthetic import synthetic_dataset

__all__ = [
    "Dataset",
    "DownloadError",
    "ItemTable",
    "Split",
    "attribute_shares",
    "common_attributes",
    "cross_validation_splits",
    "describe",
    "download",
    "read_dataset",
    "split_users",
    "synthetic_dataset",
]
