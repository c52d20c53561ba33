"""The verbs: one file, one action, one public function of the same name, one transaction."""
