//! Federation of trust domains by the SPIFFE specifications: the bundle document, and how one is fetched.

mod document;
mod endpoint;

pub use document::{Bundle, InvalidBundle, MAX_BYTES};
pub use endpoint::{Endpoint, Profile, Url, fetch};
