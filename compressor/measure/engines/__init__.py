"""Inference engines that can be measured, one file each."""
