"""Our backbone inside other projects' detectors; imported by their configurations only."""
