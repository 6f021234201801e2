"""Certificates of one cluster: an authority, a certificate per component, and more for any user a test wants to be."""

import base64
import datetime
import ipaddress
import json
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_VALID = datetime.timedelta(days=3650)
# Clocks of other machines do not matter on loopback; a step back of this one's clock does.
_SLACK = datetime.timedelta(hours=1)


class Pki:
    """A folder of certificates and keys, each made when it is first asked for.

    Attributes:
        folder: where the files lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """The authority's key."""
        return self.folder / "ca.key"

    @property
    def service_account_key(self) -> Path:
        """Private key that signs service account tokens."""
        return self.folder / "service-account.key"

    @property
    def service_account_public_key(self) -> Path:
        """Public half of `service_account_key`."""
        return self.folder / "service-account.pub"

    def ensure(self) -> None:
        """Make the authority and the service account key pair, where they are not there yet."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.ca.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            name = _name("mlx-operator-local-cluster")
            certificate = _builder(name, name, key.public_key(), key.public_key(), authority=True).sign(
                key, hashes.SHA256()
            )
            _write(self.ca_key, _private(key))
            _write(self.ca, certificate.public_bytes(serialization.Encoding.PEM))
        if not self.service_account_public_key.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            _write(self.service_account_key, _private(key))
            _write(
                self.service_account_public_key,
                key.public_key().public_bytes(
                    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
                ),
            )

    def issue(
        self, file: str, *, user: str, groups: Sequence[str] = (), hosts: Sequence[str] = ()
    ) -> tuple[Path, Path]:
        """Return (certificate, key) of a user or server, made when they are not there yet.

        Args:
            file: name of the files, without suffix.
            user: the common name: Kubernetes' user name.
            groups: the organisations: Kubernetes' groups.
            hosts: DNS names and IP addresses, for a server.
        """
        certificate_path, key_path = self.folder / f"{file}.crt", self.folder / f"{file}.key"
        if not certificate_path.exists():
            authority = x509.load_pem_x509_certificate(self.ca.read_bytes())
            authority_key = serialization.load_pem_private_key(self.ca_key.read_bytes(), password=None)
            if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
                raise TypeError(f"{self.ca_key} is not the elliptic-curve key that this program made")
            key = ec.generate_private_key(ec.SECP256R1())
            builder = _builder(
                _name(user, groups), authority.subject, key.public_key(), authority_key.public_key(), authority=False
            )
            if hosts:
                builder = builder.add_extension(
                    x509.SubjectAlternativeName([_general_name(h) for h in hosts]), critical=False
                )
            _write(key_path, _private(key))
            certificate = builder.sign(authority_key, hashes.SHA256())
            _write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))
        return certificate_path, key_path

    def write_kubeconfig(self, target: Path, *, server: str, user: str, groups: Sequence[str] = ()) -> Path:
        """Write a kubeconfig (JSON, which is YAML) with embedded certificates, and return its path.

        Args:
            target: the file.
            server: URL of the API server.
            user: Kubernetes' user name.
            groups: Kubernetes' groups.
        """
        certificate, key = self.issue(_file_name("user", user, *groups), user=user, groups=groups)
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {"name": "local", "cluster": {"server": server, "certificate-authority-data": _data(self.ca)}}
            ],
            "users": [
                {
                    "name": user,
                    "user": {"client-certificate-data": _data(certificate), "client-key-data": _data(key)},
                }
            ],
            "contexts": [{"name": "local", "context": {"cluster": "local", "user": user}}],
            "current-context": "local",
        }
        _write(target, json.dumps(config, indent=1).encode())
        return target


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    *,
    authority: bool,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    # Key usage and key identifiers are what Python's strict verification asks for since 3.13.
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLACK)
        .not_valid_after(now + _VALID)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )
    if authority:
        return builder
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return builder.add_extension(purposes, critical=False)


def _name(user: str, groups: Sequence[str] = ()) -> x509.Name:
    organisations = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
    return x509.Name([*organisations, x509.NameAttribute(NameOID.COMMON_NAME, user)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _file_name(*words: str) -> str:
    return "-".join("".join(c if c.isalnum() else "_" for c in word) for word in words)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def _data(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _write(path: Path, data: bytes) -> None:
    # In place only when whole: a crash in between must not leave half a certificate that a later run takes for one.
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.touch(mode=0o600)
    unfinished.write_bytes(data)
    os.replace(unfinished, path)
