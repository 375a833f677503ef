//! The namespace test kit.
