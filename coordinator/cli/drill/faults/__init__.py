"""The faults of a drill, one module each, in the order in which they are caused."""
