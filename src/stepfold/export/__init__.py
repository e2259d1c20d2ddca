"""A student becomes files of other programs: pipelines, LoRAs, single files, graphs, a page."""
