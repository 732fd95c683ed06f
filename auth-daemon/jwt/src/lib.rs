//! JWT-SVIDs (SPIFFE JWT-SVID): short-lived tokens that prove a SPIFFE ID to the audiences that they name. No I/O.

#![forbid(unsafe_code)]

mod audience;
mod keys;
mod signing;
mod svid;

pub use audience::{Audience, InvalidAudience};
pub use keys::{InvalidKeys, JwtKeys, KEY_USE};
pub use signing::{SigningKey, Unsignable};
pub use svid::{JwtSvid, MAX_TOKEN, Untrusted};
