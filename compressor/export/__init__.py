"""Artifacts in the formats that serving engines load: one file per format."""
