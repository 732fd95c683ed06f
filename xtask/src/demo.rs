//! `cargo xtask demo`: two nodes' pods talk mutual TLS, and each step shows its evidence. Listed in main.rs once written.
