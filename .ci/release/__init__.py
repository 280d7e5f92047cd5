"""What a release is made of: locked dependencies, artifacts, a bill of materials, checksums, a signature."""
