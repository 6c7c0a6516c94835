//! Tests through public faces.
