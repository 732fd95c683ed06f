//! CertificateSigningRequests, by which a user proves its name at the API server to others: the API server writes the
//! name into the object, and no one can change it.

use std::fmt::Write;

use aws_lc_rs::digest::{SHA256, digest};
use k8s_openapi::{
    ByteString,
    api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec},
};
use kube::{Client, api::ObjectMeta};

use crate::{ApiError, Objects};

/// No signer has this name. Pending requests are deleted after a day.
const SIGNER: &str = "auth-daemon.io/person";

/// Posts `csr` (PKCS #10, PEM). Needs the right `create` on `certificatesigningrequests`.
pub async fn post_signing_request(client: &Client, csr: &str) -> Result<(), ApiError> {
    let request = CertificateSigningRequest {
        metadata: ObjectMeta {
            name: Some(name(csr)),
            ..ObjectMeta::default()
        },
        spec: CertificateSigningRequestSpec {
            request: ByteString(csr.as_bytes().to_vec()),
            signer_name: SIGNER.to_owned(),
            usages: Some(vec!["client auth".to_owned()]),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    };
    let requests = Objects::<CertificateSigningRequest>::all(client.clone());
    requests.create(&request).await.map(drop)
}

/// Returns the user who posted `csr`, if anybody did. Needs the right `get` on `certificatesigningrequests`.
pub async fn poster_of(client: &Client, csr: &str) -> Result<Option<String>, ApiError> {
    let requests = Objects::<CertificateSigningRequest>::all(client.clone());
    let found = requests.get(&name(csr)).await?;
    Ok(found
        .map(|found| found.spec)
        .filter(|spec| spec.signer_name == SIGNER && spec.request.0 == csr.as_bytes())
        .and_then(|spec| spec.username))
}

/// The name of the object for `csr`.
fn name(csr: &str) -> String {
    let digest = digest(&SHA256, csr.as_bytes());
    let mut name = "auth-daemon-person-".to_owned();
    for byte in &digest.as_ref()[..16] {
        // Writing to a string does not fail.
        let _ = write!(name, "{byte:02x}");
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_request_has_an_object_of_its_own() {
        assert_ne!(name("a"), name("b"));
        let name = name("a");
        assert!(
            name.len() < 63 && name.starts_with("auth-daemon-person-"),
            "{name}"
        );
    }
}
