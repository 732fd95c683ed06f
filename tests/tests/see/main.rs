//! The page that shows the mesh, in a real browser.

#[path = "../common/mod.rs"]
mod common;

mod chromium;
mod large;
mod live;
mod made_up;
