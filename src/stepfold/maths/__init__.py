"""The maths of the method: plain functions of tensors, without I/O, configuration or choice of device or dtype."""
