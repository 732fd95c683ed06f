//! JWT-SVIDs (SPIFFE JWT-SVID): tokens that prove a SPIFFE ID to whoever they name as their audience, and expire within
//! minutes. No I/O.

#![forbid(unsafe_code)]

mod audience;
mod keys;
mod signing;
mod svid;

pub use audience::{Audience, InvalidAudience};
pub use keys::{InvalidKeys, JwtKeys, KEY_USE};
pub use signing::{SigningKey, Unsignable};
pub use svid::{JwtSvid, MAX_TOKEN, Untrusted};
