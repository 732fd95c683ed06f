//! Handshake errors in words for an operator.

use rustls::{
    AlertDescription, CertificateError, Error, InvalidMessage, OtherError, pki_types::UnixTime,
};

/// Explains a handshake error to an operator, with what to check next.
pub fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(why))) => {
            format!("the peer's certificate is refused: {why}")
        }
        Error::InvalidCertificate(CertificateError::NotValidYetContext { time, not_before }) => {
            format!(
                "the peer's certificate is not valid yet: it begins {} after this node's clock; \
                 compare the clocks (NTP) of both nodes",
                difference(*not_before, *time)
            )
        }
        Error::InvalidCertificate(CertificateError::ExpiredContext { time, not_after }) => format!(
            "the peer's certificate has expired: it ended {} before this node's clock; \
             is its renewal failing, or are the clocks (NTP) of the nodes apart?",
            difference(*time, *not_after)
        ),
        // A root with the same name but another key shows as an invalid signature.
        Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => "the peer's certificate is not issued by its trust domain's CA".into(),
        Error::InvalidCertificate(
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. },
        ) => "the peer's certificate lacks the extended key usage for its side: servers need serverAuth, clients \
              clientAuth"
            .into(),
        Error::PeerIncompatible(why) => {
            format!("the peer does not speak TLS 1.3 in a way that is accepted here: {why:?}")
        }
        Error::InvalidMessage(
            InvalidMessage::HandshakePayloadTooLarge | InvalidMessage::MessageTooLarge,
        ) => "the peer's handshake is too large".into(),
        Error::InvalidCertificate(why) => format!("the peer's certificate is refused: {why:?}"),
        Error::NoCertificatesPresented => "the peer presents no certificate".into(),
        Error::AlertReceived(alert) => explain_alert(*alert),
        other => other.to_string(),
    }
}

/// Explains an alert that the peer sent.
pub fn explain_alert(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::CertificateExpired => {
            "the peer refuses our certificate as expired or not valid yet: compare the clocks (NTP) of both nodes"
                .into()
        }
        AlertDescription::UnknownCA | AlertDescription::DecryptError => {
            format!("the peer refuses our certificate ({alert:?}): is its node of another trust domain or CA?")
        }
        AlertDescription::CertificateUnknown | AlertDescription::CertificateRevoked => {
            "the peer rejects our certificate; is it revoked? Its node's log says why".into()
        }
        alert => format!("the peer refuses the handshake: {alert:?}"),
    }
}

fn difference(later: UnixTime, earlier: UnixTime) -> String {
    let seconds = later.as_secs().saturating_sub(earlier.as_secs());
    match seconds {
        0..120 => format!("{seconds} seconds"),
        120..7200 => format!("{} minutes", seconds / 60),
        _ => format!("{} hours", seconds / 3600),
    }
}
