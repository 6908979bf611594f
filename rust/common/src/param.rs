//! Command-line parameters.
