"""ARKitScenes: 5,047 scans of 1,661 rooms with a tablet's LiDAR."""
