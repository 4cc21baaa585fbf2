"""S3-compatible buckets: requests, large files in parts, deadlines, and what servers' answers mean."""
