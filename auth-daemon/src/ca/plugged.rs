//! A signing certificate from another CA, in the files that Istio takes one from (`cacerts`).

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rcgen::{CertificateParams, KeyPair, PublicKeyData};
use rustls::{
    RootCertStore,
    client::verify_server_cert_signed_by_trust_anchor,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, UnixTime, pem::PemObject},
    server::{ParsedCertificate, WebPkiClientVerifier},
};
use x509_parser::certificate::X509Certificate;

use super::{
    csr::RequestedKey,
    files,
    signer::{self, Life, Signer},
};
use crate::mesh::TrustDomain;

const CERTIFICATE: &str = "ca-cert.pem";
const KEY: &str = "ca-key.pem";
const ROOTS: &str = "root-cert.pem";
const CHAIN: &str = "cert-chain.pem";
/// Longest file that is read.
const MAX_BYTES: u64 = 1 << 20;
/// Certificates between a leaf and the root: as many as the tunnel reads.
const MAX_INTERMEDIATES: usize = 8;

/// What the files hold.
#[derive(Debug)]
pub(super) struct PluggedIn {
    pub(super) signer: Arc<Signer>,
    /// All of root-cert.pem that are valid: the one that the chain holds to first.
    pub(super) roots: Vec<CertificateDer<'static>>,
}

/// Reads and checks the files in `directory`, at `now` (seconds since the Unix epoch). Returns all faults at once, each
/// with its file.
pub(super) fn load(
    directory: &Path,
    trust_domain: &TrustDomain,
    now: u64,
) -> Result<PluggedIn, Vec<String>> {
    let mut faults = Vec::new();
    let key = read(directory, KEY, true, &mut faults);
    let certificates = [CERTIFICATE, ROOTS, CHAIN].map(|name| {
        let text = read(directory, name, false, &mut faults)?;
        certificates(&text)
            .and_then(|found| match found.is_empty() && name != CHAIN {
                true => Err("has no certificate".into()),
                false => Ok(found),
            })
            .map_err(|what| faults.push(fault(directory, name, &what)))
            .ok()
    });
    let key = key.and_then(|pem| {
        signer::key_from_pem(&pem)
            .map_err(|what| faults.push(fault(directory, KEY, &what)))
            .ok()
    });
    let [Some(own), Some(roots), Some(chain)] = &certificates else {
        return Err(faults);
    };
    let files = Files {
        directory,
        trust_domain,
        now,
    };
    let checked = files.check(own, roots, chain, key.as_ref(), &mut faults);
    let (Some(checked), Some(key), true) = (checked, key, faults.is_empty()) else {
        return Err(faults);
    };
    let signer = Signer::new(key, checked.own, checked.above, checked.life)
        .map_err(|what| vec![fault(directory, KEY, &what)])?;
    let plugged = PluggedIn {
        signer: Arc::new(signer),
        roots: checked.roots,
    };
    // What is left is what only the reader of a certificate knows: signatures with SHA-1, constraints of names, purposes.
    prove(&plugged, trust_domain, now)
        .map_err(|what| vec![fault(directory, CERTIFICATE, &what)])?;
    Ok(plugged)
}

impl PluggedIn {
    /// Nobody but the operator can replace what is plugged in.
    pub(super) fn warn_of_its_end(&self, now: u64) {
        let life = self.signer.life();
        let left = life.end.saturating_sub(now);
        if left < life.end.saturating_sub(life.begin) / 5 {
            tracing::warn!(
                days_left = left / (24 * 60 * 60),
                "the plugged-in CA certificate, or one above it, nears its end: plug in a new one"
            );
        }
    }
}

struct Files<'a> {
    directory: &'a Path,
    trust_domain: &'a TrustDomain,
    now: u64,
}

struct Checked {
    own: CertificateDer<'static>,
    above: Vec<CertificateDer<'static>>,
    roots: Vec<CertificateDer<'static>>,
    life: Life,
}

impl Files<'_> {
    fn check(
        &self,
        own: &[CertificateDer<'static>],
        roots: &[CertificateDer<'static>],
        chain: &[CertificateDer<'static>],
        key: Option<&KeyPair>,
        faults: &mut Vec<String>,
    ) -> Option<Checked> {
        let mut fault = |name: &str, what: &str| faults.push(fault(self.directory, name, what));
        // Some tools put the whole chain into ca-cert.pem: the first is the one.
        let own_parsed = self.parsed(&own[..1], CERTIFICATE, &mut fault)?.remove(0);
        let roots_parsed = self.parsed(roots, ROOTS, &mut fault)?;
        let chain_parsed = self.parsed(chain, CHAIN, &mut fault)?;

        if let Err(what) = signer::check_may_sign(&own_parsed) {
            fault(CERTIFICATE, &what);
        }
        if let Err(what) = self.valid_now(&own_parsed) {
            fault(CERTIFICATE, &what);
        }
        if key.is_some_and(|key| key.subject_public_key_info() != own_parsed.public_key().raw) {
            fault(KEY, &format!("is not the key of {CERTIFICATE}"));
        }
        if let Ok(Some(usage)) = own_parsed.key_usage()
            && !usage.value.crl_sign()
        {
            tracing::warn!(
                file = %self.directory.join(CERTIFICATE).display(),
                "keyUsage lacks cRLSign: this mesh's daemons take revocation lists signed with it, other software \
                 will not"
            );
        }
        let domain = format!("spiffe://{}", self.trust_domain);
        for uri in signer::uris(&own_parsed) {
            let rest = uri.strip_prefix(&domain);
            if uri.starts_with("spiffe://")
                && !rest.is_some_and(|r| r.is_empty() || r.starts_with('/'))
            {
                let what = format!(
                    "is of {uri:.256?}, but trustDomain is {}",
                    self.trust_domain
                );
                fault(CERTIFICATE, &what);
            }
        }

        // From the certificate up to a root, by name and signature.
        let mut above: Vec<CertificateDer<'static>> = Vec::new();
        let mut life = signer::life(&own_parsed);
        let mut current = (&own_parsed, &own[0]);
        let mut below = 0;
        let root = loop {
            if let Some(at) = roots.iter().position(|root| root == current.1) {
                break at;
            }
            above.push(current.1.clone());
            if above.len() > MAX_INTERMEDIATES {
                let what = format!("more than {MAX_INTERMEDIATES} certificates up to the root");
                fault(CHAIN, &what);
                return None;
            }
            below += 1;
            if let Some(at) = roots_parsed.iter().position(|root| issued(root, current.0)) {
                self.check_above(&roots_parsed[at], below, ROOTS, &mut fault);
                break at;
            }
            let next = (0..chain.len())
                .find(|&at| !above.contains(&chain[at]) && issued(&chain_parsed[at], current.0));
            let Some(at) = next else {
                let what = format!(
                    "does not lead from {CERTIFICATE} to a root of {ROOTS}: nothing there has signed {} for {}",
                    current.0.subject(),
                    current.0.issuer()
                );
                fault(CHAIN, &what);
                return None;
            };
            self.check_above(&chain_parsed[at], below, CHAIN, &mut fault);
            life = narrower(life, signer::life(&chain_parsed[at]));
            current = (&chain_parsed[at], &chain[at]);
        };
        life = narrower(life, signer::life(&roots_parsed[root]));
        let mut bundle = vec![roots[root].clone()];
        for (der, parsed) in roots.iter().zip(&roots_parsed) {
            if bundle.contains(der) {
                continue;
            }
            match signer::check_may_sign(parsed).and_then(|()| self.valid_now(parsed)) {
                Ok(()) => bundle.push(der.clone()),
                // One that served its time beside the one that counts must not keep the CA from starting.
                Err(what) => {
                    tracing::warn!(subject = %parsed.subject(), "{ROOTS}: root left out: {what}");
                }
            }
        }
        Some(Checked {
            own: own[0].clone(),
            above,
            roots: bundle,
            life,
        })
    }

    fn parsed<'a>(
        &self,
        certificates: &'a [CertificateDer<'static>],
        name: &str,
        fault: &mut impl FnMut(&str, &str),
    ) -> Option<Vec<X509Certificate<'a>>> {
        let parsed: Result<Vec<_>, _> = certificates.iter().map(|der| signer::parse(der)).collect();
        parsed.map_err(|what| fault(name, &what)).ok()
    }

    fn valid_now(&self, certificate: &X509Certificate<'_>) -> Result<(), String> {
        let life = signer::life(certificate);
        let validity = certificate.validity();
        if self.now < life.begin {
            return Err(format!(
                "the certificate begins on {} only",
                validity.not_before
            ));
        }
        if self.now >= life.end {
            return Err(format!(
                "the certificate has ended on {}",
                validity.not_after
            ));
        }
        Ok(())
    }

    /// A certificate with `below` others between it and the leaf.
    fn check_above(
        &self,
        certificate: &X509Certificate<'_>,
        below: usize,
        name: &str,
        fault: &mut impl FnMut(&str, &str),
    ) {
        let mut found = Vec::new();
        found.extend(signer::check_may_sign(certificate).err());
        found.extend(self.valid_now(certificate).err());
        let constraints = certificate.basic_constraints().ok().flatten();
        let longest = constraints.and_then(|constraints| constraints.value.path_len_constraint);
        if longest.is_some_and(|longest| (longest as usize) < below) {
            found.push(format!(
                "its path length allows for fewer than {below} CAs below it"
            ));
        }
        for what in found {
            fault(name, &format!("{}: {what}", certificate.subject()));
        }
    }
}

/// Whether `issuer` has signed `certificate`.
fn issued(issuer: &X509Certificate<'_>, certificate: &X509Certificate<'_>) -> bool {
    issuer.subject().as_raw() == certificate.issuer().as_raw()
        && certificate
            .verify_signature(Some(issuer.public_key()))
            .is_ok()
}

fn narrower(a: Life, b: Life) -> Life {
    Life {
        begin: a.begin.max(b.begin),
        end: a.end.min(b.end),
    }
}

/// Signs a certificate and reads it as the daemons do, in both directions. It is not kept.
fn prove(plugged: &PluggedIn, trust_domain: &TrustDomain, now: u64) -> Result<(), String> {
    let failed =
        |error: &dyn std::fmt::Display| format!("signs certificates that TLS refuses: {error}");
    let identity = trust_domain
        .identity("auth-daemon", "probe")
        .map_err(|error| failed(&error))?;
    let key = KeyPair::generate().map_err(|error| failed(&error))?;
    let csr = CertificateParams::default()
        .serialize_request(&key)
        .map_err(|error| failed(&error))?;
    let key = RequestedKey::from_csr(csr.der()).map_err(|error| failed(&error))?;
    let leaf = plugged
        .signer
        .svid(&identity, &key, 3600, now)
        .map_err(|error| error.to_string())?;
    let mut roots = RootCertStore::empty();
    for root in &plugged.roots {
        roots.add(root.clone()).map_err(|error| failed(&error))?;
    }
    let (roots, provider) = (Arc::new(roots), Arc::new(aws_lc_rs::default_provider()));
    let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
    let parsed = ParsedCertificate::try_from(&leaf.certificate).map_err(|error| failed(&error))?;
    verify_server_cert_signed_by_trust_anchor(
        &parsed,
        &roots,
        plugged.signer.above(),
        now,
        provider.signature_verification_algorithms.all,
    )
    .map_err(|error| failed(&error))?;
    WebPkiClientVerifier::builder_with_provider(roots, provider)
        .build()
        .map_err(|error| failed(&error))?
        .verify_client_cert(&leaf.certificate, plugged.signer.above(), now)
        .map_err(|error| failed(&error))?;
    Ok(())
}

fn fault(directory: &Path, name: &str, what: &str) -> String {
    format!("{}: {what}", directory.join(name).display())
}

fn read(directory: &Path, name: &str, private: bool, faults: &mut Vec<String>) -> Option<String> {
    let path: PathBuf = directory.join(name);
    let mut failed = |what: String| faults.push(format!("{}: {what}", path.display()));
    let opened = fs::File::open(&path).and_then(|file| Ok((file.metadata()?, file)));
    let (metadata, mut file) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            failed(format!("cannot be read: {error}"));
            return None;
        }
    };
    if let Some(what) = files::writable_by_others(&metadata) {
        failed(format!("{what}: somebody else could put another CA here"));
    }
    if private
        && let Some(mode) = files::exposed_mode(&metadata)
        && !shared_with_our_group(&metadata)
    {
        failed(format!(
            "mode {mode:03o} lets others than its owner in; the key may be known to them. If it is not, run `chmod \
             600 {}` (of a Kubernetes Secret's volume: `defaultMode: 0400`)",
            path.display()
        ));
    }
    let content = files::read_at_most(&mut file, MAX_BYTES)
        .and_then(|bytes| String::from_utf8(bytes).map_err(std::io::Error::other));
    content
        .map_err(|error| failed(format!("cannot be read: {error}")))
        .ok()
}

/// How Kubernetes gives a Secret to a pod that is not root: root's file, readable for the pod's own group (`fsGroup`).
fn shared_with_our_group(metadata: &fs::Metadata) -> bool {
    metadata.mode() & 0o037 == 0
        && metadata.uid() == 0
        && !nix::unistd::geteuid().is_root()
        && nix::unistd::getgroups()
            .is_ok_and(|groups| groups.iter().any(|group| group.as_raw() == metadata.gid()))
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    certificates.map_err(|error| format!("is not PEM: {error}"))
}

#[cfg(test)]
pub(super) mod tests {
    use std::{os::unix::fs::PermissionsExt, process::Command};

    use super::*;

    fn run(directory: &Path, arguments: &[&str]) {
        let output = Command::new("openssl")
            .args(arguments)
            .current_dir(directory)
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }

    const CA: &str = "basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign,cRLSign\n\
                      subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n";

    /// Signs `name`.pem for a new key of the kind `key` with `issuer`'s.
    fn sign(
        directory: &Path,
        name: &str,
        subject: &str,
        issuer: &str,
        extensions: &str,
        key: &[&str],
    ) {
        let file = |name: &str, kind| format!("{name}.{kind}");
        let (key_file, request) = (file(name, "key"), file(name, "csr"));
        run(
            directory,
            &[&key[..1], &["-out", &key_file], &key[1..]].concat(),
        );
        run(
            directory,
            &[
                "req", "-new", "-key", &key_file, "-subj", subject, "-out", &request,
            ],
        );
        fs::write(directory.join("extensions"), extensions).unwrap();
        let certificate = file(name, "pem");
        let mut arguments = vec![
            "x509",
            "-req",
            "-in",
            &request,
            "-extfile",
            "extensions",
            "-days",
            "30",
            "-out",
            &certificate,
        ];
        let (issuer_pem, issuer_key) = (file(issuer, "pem"), file(issuer, "key"));
        if issuer == name {
            arguments.extend(["-signkey", &key_file]);
        } else {
            arguments.extend(["-CA", &issuer_pem, "-CAkey", &issuer_key, "-CAcreateserial"]);
        }
        run(directory, &arguments);
    }

    /// With parameters before the key, as an older command writes them.
    const EC: &[&str] = &["ecparam", "-name", "prime256v1", "-genkey"];
    const RSA: &[&str] = &["genrsa", "-traditional", "2048"];

    /// A folder as Istio's instructions make it: a root, an intermediate CA of the company's, and one for the cluster,
    /// with a name that has a part twice.
    pub(in crate::ca) fn istio(directory: &Path) {
        make(
            directory,
            EC,
            "",
            "spiffe://cluster.local/ns/istio-system/sa/citadel",
        );
    }

    fn make(directory: &Path, key: &[&str], ca_extensions: &str, uri: &str) {
        sign(directory, "root", "/O=Example/CN=Root", "root", CA, EC);
        sign(
            directory,
            "middle",
            "/DC=com/DC=example/CN=Middle",
            "root",
            CA,
            EC,
        );
        let extensions = format!("{CA}subjectAltName=URI:{uri}\n{ca_extensions}");
        sign(
            directory,
            "ca",
            "/DC=com/DC=example/CN=Cluster",
            "middle",
            &extensions,
            key,
        );
        let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
        let write = |name: &str, content: String| fs::write(directory.join(name), content).unwrap();
        write(CERTIFICATE, read("ca.pem"));
        write(KEY, read("ca.key"));
        write(ROOTS, read("root.pem"));
        write(
            CHAIN,
            read("ca.pem") + &read("middle.pem") + &read("root.pem"),
        );
        fs::set_permissions(directory.join(KEY), fs::Permissions::from_mode(0o600)).unwrap();
    }

    fn now() -> u64 {
        crate::tunnel::tls::unix_seconds(std::time::SystemTime::now())
    }

    fn load_at(directory: &Path, now: u64) -> Result<PluggedIn, Vec<String>> {
        load(directory, &"cluster.local".parse().unwrap(), now)
    }

    #[test]
    fn takes_the_layouts_that_are_about() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        for key in [
            EC,
            RSA,
            &["genpkey", "-algorithm", "ED25519"],
            &["genpkey", "-algorithm", "RSA"],
        ] {
            make(path, key, "", "spiffe://cluster.local");
            let plugged = load_at(path, now()).unwrap();
            assert_eq!(plugged.signer.above().len(), 2);
            assert_eq!(plugged.roots.len(), 1);
        }
        let read = |name: &str| fs::read_to_string(path.join(name)).unwrap();
        // Without the root and itself, out of order, with a second root.
        fs::write(path.join(CHAIN), read("middle.pem")).unwrap();
        load_at(path, now()).unwrap();
        fs::write(
            path.join(CHAIN),
            read("root.pem") + &read("middle.pem") + &read("ca.pem"),
        )
        .unwrap();
        sign(path, "next", "/CN=Next", "next", CA, EC);
        fs::write(path.join(ROOTS), read("next.pem") + &read("root.pem")).unwrap();
        let plugged = load_at(path, now()).unwrap();
        assert_eq!((plugged.signer.above().len(), plugged.roots.len()), (2, 2));
        assert_eq!(
            plugged.roots[0],
            CertificateDer::from_pem_slice(read("root.pem").as_bytes()).unwrap(),
            "the one that counts comes first"
        );
        // The middle one as the root: what is above it does not matter then.
        fs::write(path.join(ROOTS), read("middle.pem")).unwrap();
        assert_eq!(load_at(path, now()).unwrap().signer.above().len(), 1);
        // A root that signs itself.
        fs::write(path.join(CHAIN), "").unwrap();
        fs::write(path.join(ROOTS), read("root.pem")).unwrap();
        fs::write(path.join(CERTIFICATE), read("root.pem")).unwrap();
        fs::write(path.join(KEY), read("root.key")).unwrap();
        assert!(load_at(path, now()).unwrap().signer.above().is_empty());
    }

    #[test]
    fn names_all_faults() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let faults = |at| load_at(path, at).unwrap_err().join("\n");
        let missing = faults(now());
        for file in [CERTIFICATE, KEY, ROOTS, CHAIN] {
            assert!(
                missing.contains(&format!("{file}: cannot be read")),
                "{missing}"
            );
        }
        let broken = |change: &dyn Fn(), expected: &[&str]| {
            istio(path);
            change();
            let found = faults(now());
            for expected in expected {
                assert!(found.contains(expected), "{expected} in\n{found}");
            }
        };
        let read = |name: &str| fs::read_to_string(path.join(name)).unwrap();
        let write = |name: &str, content: &str| fs::write(path.join(name), content).unwrap();
        let mode =
            |mode| fs::set_permissions(path.join(KEY), fs::Permissions::from_mode(mode)).unwrap();
        broken(
            &|| {
                write(KEY, &read("middle.key"));
                mode(0o644);
            },
            &[
                "is not the key of ca-cert.pem",
                "mode 644",
                "defaultMode: 0400",
            ],
        );
        broken(
            &|| write(KEY, "rubbish"),
            &["ca-key.pem: has no usable private key"],
        );
        broken(
            &|| write(CHAIN, &read("ca.pem")),
            &["does not lead from ca-cert.pem to a root"],
        );
        broken(&|| write(ROOTS, ""), &["root-cert.pem: has no certificate"]);
        broken(
            &|| {
                sign(path, "other", "/O=Example/CN=Root", "other", CA, EC);
                write(ROOTS, &read("other.pem"));
            },
            &["does not lead"],
        );
        broken(
            &|| {
                sign(
                    path,
                    "leaf",
                    "/CN=Leaf",
                    "middle",
                    "basicConstraints=CA:false\nkeyUsage=digitalSignature",
                    EC,
                );
                write(CERTIFICATE, &read("leaf.pem"));
                write(KEY, &read("leaf.key"));
            },
            &["lacks CA:TRUE"],
        );
        broken(
            &|| {
                let short = CA.replace("CA:true", "CA:true,pathlen:0");
                sign(
                    path,
                    "middle",
                    "/DC=com/DC=example/CN=Middle",
                    "root",
                    &short,
                    EC,
                );
                sign(path, "ca", "/CN=Cluster", "middle", CA, EC);
                write(CERTIFICATE, &read("ca.pem"));
                write(KEY, &read("ca.key"));
                write(CHAIN, &read("middle.pem"));
            },
            &["path length"],
        );
        make(path, EC, "", "spiffe://example.org/ns/a/sa/b");
        assert!(faults(now()).contains("trustDomain is cluster.local"));
        // What only a reader of certificates finds.
        make(
            path,
            EC,
            "extendedKeyUsage=codeSigning\n",
            "spiffe://cluster.local",
        );
        let found = faults(now());
        assert!(found.contains("TLS refuses"), "{found}");
        istio(path);
        assert!(faults(now() - 3600 * 24).contains("begins on"));
        assert!(faults(now() + 3600 * 24 * 31).contains("has ended on"));
        let warned = load_at(path, now() + 3600 * 24 * 29).unwrap();
        warned.warn_of_its_end(now());
    }

    #[test]
    fn signs_lists_even_where_istio_forgot_to_say_so() {
        let folder = tempfile::tempdir().unwrap();
        let istio = CA.replace(
            "keyCertSign,cRLSign",
            "digitalSignature,nonRepudiation,keyEncipherment,keyCertSign",
        );
        let path = folder.path();
        sign(path, "root", "/O=Istio/CN=Root", "root", CA, EC);
        sign(
            path,
            "ca",
            "/O=Istio/CN=Intermediate CA/L=cluster1",
            "root",
            &istio,
            RSA,
        );
        for (from, to) in [
            ("ca.pem", CERTIFICATE),
            ("ca.key", KEY),
            ("root.pem", ROOTS),
            ("ca.pem", CHAIN),
        ] {
            fs::copy(path.join(from), path.join(to)).unwrap();
        }
        fs::set_permissions(path.join(KEY), fs::Permissions::from_mode(0o600)).unwrap();
        let plugged = load_at(path, now()).unwrap();
        let domain: TrustDomain = "cluster.local".parse().unwrap();
        let core =
            crate::ca::state::Core::of_plugged_in(&domain, plugged.signer.certificate().clone());
        let crl = crate::ca::revocation::write(&core, &[], 1, &plugged.signer, now()).unwrap();
        let signers = [plugged.signer.certificate().clone()];
        assert_eq!(
            crate::ca::revocation::read_crl(&crl, &signers),
            Ok(Vec::new())
        );
    }
}
