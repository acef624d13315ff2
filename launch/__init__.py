"""Entry points: compose the configuration, call the pipeline, turn errors into exit statuses."""
