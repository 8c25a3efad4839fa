# Who may do what, by key:
#   objects/<sha256>                       candidate creates, collector deletes
#   versions/<id>/manifest.json, .sig      candidate creates, collector deletes
#   promotions/<model>/<number>.json       promoter creates, nobody deletes or overwrites: this log says who is champion
#   probe/…                                candidate and promoter create, collector deletes
# Every write creates an object (If-None-Match: *). These limits also hold for versions that others made.

# The bucket's policy binds everybody, including the account's administrators (who can change it, and that is logged).
data "aws_iam_policy_document" "bucket" {
  statement {
    sid       = "TlsOnly"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [aws_s3_bucket.store.arn, "${aws_s3_bucket.store.arn}/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }

  # The parts of a multipart upload carry no condition; its completion creates the object and must.
  statement {
    sid       = "CreateOnly"
    effect    = "Deny"
    actions   = ["s3:PutObject"]
    resources = ["${local.base}/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "Null"
      variable = "s3:if-none-match"
      values   = ["true"]
    }

    condition {
      test     = "Bool"
      variable = "s3:ObjectCreationOperation"
      values   = ["true"]
    }
  }

  # A deleted record could be created again with another champion in it.
  statement {
    sid       = "LogIsForever"
    effect    = "Deny"
    actions   = ["s3:DeleteObject", "s3:DeleteObjectVersion", "s3:PutObjectAcl", "s3:PutObjectVersionAcl"]
    resources = ["${local.base}/promotions/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }
  }

  statement {
    sid       = "OnlyPromotersPromote"
    effect    = "Deny"
    actions   = ["s3:PutObject"]
    resources = ["${local.base}/promotions/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "ArnNotEquals"
      variable = "aws:PrincipalArn"
      values   = [for name, role in aws_iam_role.role : role.arn if name == "promoter"]
    }
  }
}

# For serving and for people who look: reads everything, changes nothing.
data "aws_iam_policy_document" "reader" {
  statement {
    sid       = "List"
    actions   = ["s3:ListBucket", "s3:GetBucketLocation"]
    resources = [aws_s3_bucket.store.arn]
  }

  statement {
    sid       = "Read"
    actions   = ["s3:GetObject"]
    resources = ["${local.base}/*"]
  }

  dynamic "statement" {
    for_each = var.kms_key_arn == null ? [] : [var.kms_key_arn]

    content {
      sid       = "Decrypt"
      actions   = ["kms:Decrypt"]
      resources = [statement.value]
    }
  }
}

# For training machines: publishes versions and nothing else. No key under promotions/, no delete.
data "aws_iam_policy_document" "candidate" {
  source_policy_documents = [data.aws_iam_policy_document.reader.json]

  statement {
    sid     = "CreateVersions"
    actions = ["s3:PutObject"]
    resources = [
      "${local.base}/objects/*",
      "${local.base}/versions/*",
      "${local.base}/probe/*",
    ]
  }

  statement {
    sid       = "ResumeUploads"
    actions   = ["s3:ListMultipartUploadParts", "s3:AbortMultipartUpload"]
    resources = ["${local.base}/objects/*"]
  }

  statement {
    sid       = "FindUploads"
    actions   = ["s3:ListBucketMultipartUploads"]
    resources = [aws_s3_bucket.store.arn]
  }

  # This holds whatever else somebody attaches to the role.
  statement {
    sid     = "NeverPromote"
    effect  = "Deny"
    actions = ["s3:PutObject", "s3:DeleteObject", "s3:DeleteObjectVersion"]
    resources = [
      "${local.base}/promotions/*",
    ]
  }

  dynamic "statement" {
    for_each = var.kms_key_arn == null ? [] : [var.kms_key_arn]

    content {
      sid       = "Encrypt"
      actions   = ["kms:GenerateDataKey"]
      resources = [statement.value]
    }
  }
}

# For the machine that decides: reads everything, creates records of the log, deletes nothing.
data "aws_iam_policy_document" "promoter" {
  source_policy_documents = [data.aws_iam_policy_document.reader.json]

  statement {
    sid     = "CreateRecords"
    actions = ["s3:PutObject"]
    resources = [
      "${local.base}/promotions/*",
      "${local.base}/probe/*",
    ]

    condition {
      test     = "Null"
      variable = "s3:if-none-match"
      values   = ["false"]
    }
  }

  dynamic "statement" {
    for_each = var.kms_key_arn == null ? [] : [var.kms_key_arn]

    content {
      sid       = "Encrypt"
      actions   = ["kms:GenerateDataKey"]
      resources = [statement.value]
    }
  }
}

# For `retune gc --delete`: deletes what no version needs, creates nothing.
data "aws_iam_policy_document" "collector" {
  source_policy_documents = [data.aws_iam_policy_document.reader.json]

  statement {
    sid     = "Delete"
    actions = ["s3:DeleteObject"]
    resources = [
      "${local.base}/objects/*",
      "${local.base}/versions/*",
      "${local.base}/probe/*",
    ]
  }

  statement {
    sid       = "EndUploads"
    actions   = ["s3:ListMultipartUploadParts", "s3:AbortMultipartUpload"]
    resources = ["${local.base}/objects/*"]
  }

  statement {
    sid       = "FindUploads"
    actions   = ["s3:ListBucketMultipartUploads"]
    resources = [aws_s3_bucket.store.arn]
  }
}

locals {
  policies = {
    reader    = data.aws_iam_policy_document.reader.json
    candidate = data.aws_iam_policy_document.candidate.json
    promoter  = data.aws_iam_policy_document.promoter.json
    collector = data.aws_iam_policy_document.collector.json
  }
}

data "aws_iam_policy_document" "trust" {
  for_each = var.trusted_principals

  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "AWS"
      identifiers = each.value
    }
  }
}

resource "aws_iam_role" "role" {
  for_each           = var.trusted_principals
  name               = "${var.bucket}-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.trust[each.key].json
}

resource "aws_iam_role_policy" "role" {
  for_each = var.trusted_principals
  name     = each.key
  role     = aws_iam_role.role[each.key].id
  policy   = local.policies[each.key]
}
