//! The `bundleEndpoint` section: where other trust domains fetch this one's bundle.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use auth_support::config::{Section, absolute, duration};

use super::socket_address;

const DEFAULT_HINT: Duration = Duration::from_secs(5 * 60);
const MIN_HINT: Duration = Duration::from_secs(1);
const MAX_HINT: Duration = Duration::from_secs(24 * 60 * 60);

/// Where and how the CA serves its bundle (SPIFFE Federation §5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleEndpoint {
    /// Where it listens.
    pub listen: SocketAddr,
    /// The certificate that it presents.
    pub certificate: EndpointCertificate,
    /// How often others should fetch the bundle again. Defaults to 5 minutes; between a second and a day.
    pub refresh_hint: Duration,
}

/// The certificate of a bundle endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointCertificate {
    /// Profile `https_spiffe`: an X.509-SVID that the CA issues to itself.
    Svid,
    /// Profile `https_web`: from files in PEM, which are read again when they change.
    Files {
        /// The certificate and its intermediates.
        certificate: PathBuf,
        /// The private key.
        key: PathBuf,
    },
}

impl BundleEndpoint {
    /// Takes the section from `top`. `None` if there is none, or if it is invalid.
    pub(super) fn read(top: &mut Section, errors: &mut Vec<String>) -> Option<Self> {
        if !top.has("bundleEndpoint") {
            return None;
        }
        let mut section = top.section("bundleEndpoint", errors);
        let listen = section.required("listen", errors, socket_address);
        let one_of_two = section.has("certificateFile") != section.has("keyFile");
        let certificate = section.parsed("certificateFile", errors, absolute);
        let key = section.parsed("keyFile", errors, absolute);
        if one_of_two {
            errors.push(
                "bundleEndpoint: has only one of certificateFile and keyFile; with both, it is of profile https_web, \
                 with none of https_spiffe"
                    .into(),
            );
        }
        let refresh_hint = section.parsed("refreshHint", errors, |hint| {
            duration(hint, MIN_HINT, MAX_HINT)
        });
        section.refuse_the_rest(errors);
        Some(Self {
            listen: listen?,
            certificate: match (certificate, key) {
                (Some(certificate), Some(key)) => EndpointCertificate::Files { certificate, key },
                _ => EndpointCertificate::Svid,
            },
            refresh_hint: refresh_hint.unwrap_or(DEFAULT_HINT),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Option<BundleEndpoint>, Vec<String>> {
        let mut errors = Vec::new();
        let mut top = Section::of_yaml(text, &mut errors)?;
        let endpoint = BundleEndpoint::read(&mut top, &mut errors);
        match errors.is_empty() {
            true => Ok(endpoint),
            false => Err(errors),
        }
    }

    #[test]
    fn reads_both_profiles() {
        assert_eq!(read("{}"), Ok(None));
        let spiffe = read("bundleEndpoint: {listen: '0.0.0.0:8443'}")
            .unwrap()
            .unwrap();
        assert_eq!(spiffe.certificate, EndpointCertificate::Svid);
        assert_eq!(spiffe.refresh_hint, DEFAULT_HINT);
        let web = read(
            "bundleEndpoint: {listen: '[::]:443', certificateFile: /c.pem, keyFile: /k.pem, refreshHint: 30s}",
        );
        let web = web.unwrap().unwrap();
        assert_eq!(web.refresh_hint, Duration::from_secs(30));
        let files = EndpointCertificate::Files {
            certificate: "/c.pem".into(),
            key: "/k.pem".into(),
        };
        assert_eq!(web.certificate, files);
    }

    #[test]
    fn names_every_error() {
        for (section, expected) in [
            ("{}", "bundleEndpoint.listen: is missing"),
            ("{listen: x}", "bundleEndpoint.listen: \"x\""),
            (
                "{listen: '1.2.3.4:5', keyFile: /k}",
                "has only one of certificateFile and keyFile",
            ),
            (
                "{listen: '1.2.3.4:5', refreshHint: 0s}",
                "bundleEndpoint.refreshHint: \"0s\"",
            ),
            (
                "{listen: '1.2.3.4:5', profile: x}",
                "bundleEndpoint.profile: there is no such field",
            ),
        ] {
            let errors = read(&format!("bundleEndpoint: {section}")).unwrap_err();
            assert!(
                errors.iter().any(|error| error.contains(expected)),
                "{errors:?}"
            );
        }
    }
}
