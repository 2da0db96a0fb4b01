"""Raw labelled pictures -> checked shards: WebDataset tars with an index, and FFCV .beton files."""
