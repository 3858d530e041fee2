//! Encrypted peers and clients: three nodes with certificates of one authority, and a node with one of another.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use kine_adapter::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use kine_adapter::proto::etcdserverpb::{StatusRequest, StatusResponse};
use raft_sqlite_tests::cluster::{Cluster, Flags};
use raft_sqlite_tests::{etcd, wait};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::ONE_AT_A_TIME;

/// An authority with its certificate on disk.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    path: PathBuf,
}

/// A certificate and its key on disk.
struct Certified {
    certificate: PathBuf,
    key: PathBuf,
}

impl Authority {
    fn new(folder: &Path, name: &str) -> Result<Authority> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let path = folder.join(format!("{name}.pem"));
        std::fs::write(&path, issuer.pem())?;
        Ok(Authority { issuer, path })
    }

    /// A certificate for 127.0.0.1, for servers and clients.
    fn certify(&self, folder: &Path, name: &str) -> Result<Certified> {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = KeyPair::generate()?;
        let signed = params.signed_by(&key, &self.issuer)?;
        let certified =
            Certified { certificate: folder.join(format!("{name}.crt")), key: folder.join(format!("{name}.key")) };
        std::fs::write(&certified.certificate, signed.pem())?;
        std::fs::write(&certified.key, key.serialize_pem())?;
        Ok(certified)
    }
}

/// The flags of a node whose peers and clients are encrypted.
fn encrypted(cluster: &Cluster, index: usize, authority: &Authority, own: &Certified) -> Flags {
    let mut flags = cluster.flags(index);
    for value in flags.values_mut() {
        *value = value.replace("http://", "https://");
    }
    for (flag, path) in [
        ("cert-file", &own.certificate),
        ("key-file", &own.key),
        ("trusted-ca-file", &authority.path),
        ("peer-cert-file", &own.certificate),
        ("peer-key-file", &own.key),
        ("peer-trusted-ca-file", &authority.path),
    ] {
        flags.insert(flag.to_owned(), path.display().to_string());
    }
    flags.insert("peer-client-cert-auth".to_owned(), String::new());
    flags.insert("client-cert-auth".to_owned(), String::new());
    flags
}

async fn connect(url: &str, authority: &Authority, own: Option<&Certified>) -> Result<Channel> {
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(std::fs::read(&authority.path)?));
    if let Some(own) = own {
        tls = tls.identity(Identity::from_pem(std::fs::read(&own.certificate)?, std::fs::read(&own.key)?));
    }
    Ok(Endpoint::from_shared(url.replace("http://", "https://"))?.tls_config(tls)?.connect().await?)
}

async fn status(url: &str, authority: &Authority, own: Option<&Certified>) -> Result<StatusResponse> {
    let mut client = MaintenanceClient::new(connect(url, authority, own).await?);
    Ok(client.status(StatusRequest {}).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_trust_one_authority_and_no_other() -> Result<()> {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut cluster = Cluster::prepare(3, &[])?;
    let folder = cluster.folder().to_owned();
    let (ours, theirs) = (Authority::new(&folder, "ours")?, Authority::new(&folder, "theirs")?);
    let nodes: Vec<Certified> =
        cluster.nodes.iter().map(|node| ours.certify(&folder, &node.name)).collect::<Result<_>>()?;
    for (index, own) in nodes.iter().enumerate() {
        let flags = encrypted(&cluster, index, &ours, own);
        cluster.spawn_with(index, &flags)?;
    }
    let client = ours.certify(&folder, "client")?;
    for node in &cluster.nodes {
        wait::until("an encrypted node that knows a leader", || async {
            ensure!(status(&node.client_url, &ours, Some(&client)).await?.leader != 0, "no leader");
            Ok(())
        })
        .await
        .map_err(|error| error.context(cluster.logs()))?;
        let channel = connect(&node.client_url, &ours, Some(&client)).await?;
        etcd::put(&channel, &node.name, "1").await?;
        for node in &cluster.nodes {
            // Those written so far, on every node.
            let channel = connect(&node.client_url, &ours, Some(&client)).await?;
            ensure!(etcd::get(&channel, "n1", false).await?.as_deref() == Some("1"), "n1 is lost");
        }
    }
    // Neither without a certificate, nor with one of another authority, nor in the clear.
    let stranger = theirs.certify(&folder, "stranger")?;
    let url = &cluster.nodes[0].client_url;
    ensure!(status(url, &ours, None).await.is_err(), "a client without a certificate was served");
    ensure!(status(url, &ours, Some(&stranger)).await.is_err(), "a client of another authority was served");
    ensure!(etcd::status(url).await.is_err(), "a client was served in the clear");
    // Also with the command line's own words.
    let arguments = ["--cacert", "--cert", "--key"];
    let files = [&ours.path, &client.certificate, &client.key];
    let mut listing = std::process::Command::new(raft_sqlite_tests::cluster::program()?);
    listing.args(["member", "list", "--endpoints", &url.replace("http://", "https://")]);
    for (argument, file) in arguments.iter().zip(files) {
        listing.arg(argument).arg(file);
    }
    let listed = listing.output()?;
    ensure!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));

    // A member whose certificate is of another authority comes into no contact, and both sides say why.
    cluster.stop(2)?;
    let mut flags = encrypted(&cluster, 2, &theirs, &stranger);
    for flag in ["cert-file", "key-file", "trusted-ca-file"] {
        flags.insert(flag.to_owned(), encrypted(&cluster, 2, &ours, &nodes[2])[flag].clone());
    }
    cluster.spawn_with(2, &flags)?;
    cluster.wait_logged(2, "UnknownIssuer").await?;
    let (known, log) = (status(&cluster.nodes[2].client_url, &ours, Some(&client)).await?.leader, cluster.logs());
    ensure!(known == 0, "a stranger knows the leader\n{log}");
    let channel = connect(&cluster.nodes[0].client_url, &ours, Some(&client)).await?;
    etcd::put(&channel, "without n3", "1").await?;
    cluster.stop(2)?;

    let flags = encrypted(&cluster, 2, &ours, &nodes[2]);
    cluster.spawn_with(2, &flags)?;
    wait::until("n3 with its own certificate", || async {
        let channel = connect(&cluster.nodes[2].client_url, &ours, Some(&client)).await?;
        ensure!(etcd::get(&channel, "without n3", false).await?.is_some(), "not there yet");
        Ok(())
    })
    .await
    .map_err(|error| error.context(cluster.logs()))
}
