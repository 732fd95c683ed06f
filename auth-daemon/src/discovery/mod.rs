//! Where the mesh is learnt from. A source fills the registry; nothing else writes it.

pub mod files;
pub mod kubernetes;
pub mod manifest;
pub mod removal;
