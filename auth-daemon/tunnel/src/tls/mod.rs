//! TLS: configurations, verification of peers, SVIDs, trust bundles and revocations.

mod configs;
pub mod crl;
mod explain;
pub mod svid;
pub mod trust;
mod verifier;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::{CertificateError, Error, pki_types::UnixTime};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

pub use configs::{ALPN, Configs, provider};
pub use explain::{explain, explain_alert};
pub use verifier::{Verifier, refused};

/// Checks by the local clock that a certificate with the expiry `not_after` has not expired. Session resumption does
/// not check it.
pub fn check_not_expired(not_after: SystemTime) -> Result<(), Error> {
    let now = SystemTime::now();
    if not_after > now {
        return Ok(());
    }
    let at = |time| UnixTime::since_unix_epoch(Duration::from_secs(unix_seconds(time)));
    Err(Error::InvalidCertificate(
        CertificateError::ExpiredContext {
            time: at(now),
            not_after: at(not_after),
        },
    ))
}

/// Formats `seconds` since the Unix epoch according to RFC 3339.
pub fn rfc3339(seconds: u64) -> String {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_else(|| format!("{seconds} s after 1970"))
}

/// Converts `time` to seconds since the Unix epoch.
pub fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs()
}
