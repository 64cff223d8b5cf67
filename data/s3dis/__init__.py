"""S3DIS: 272 rooms of six building areas."""
